package hsm_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
)

// Every class crosses the socket and comes back as itself, and only as itself.
func TestStatusTable(t *testing.T) {
	classes := []error{dek.ErrAuth, dek.ErrNotFound, dek.ErrExists, dek.ErrInvalid, dek.ErrCorrupt,
		dek.ErrExhausted, dek.ErrPrecondition, dek.ErrUnavailable}
	for _, class := range classes {
		status, text := hsm.StatusOf(fmt.Errorf("%w: detail", class))
		back := hsm.ErrorOf(status, text)
		for _, other := range classes {
			if got, want := errors.Is(back, other), other == class; got != want {
				t.Errorf("%v came back as %v: is %v: %t, want %t", class, back, other, got, want)
			}
		}
		if back.Error() != text {
			t.Errorf("text %q, want %q", back, text)
		}
	}
	for status := range hsm.Statuses() {
		if back, _ := hsm.StatusOf(hsm.ErrorOf(status, "x")); back != status {
			t.Errorf("status %d came back as %d", status, back)
		}
	}
	if err := hsm.ErrorOf(200, "x"); !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("unknown status: %v", err)
	}
	if status, _ := hsm.StatusOf(io.EOF); hsm.ErrorOf(status, "") == nil || !errors.Is(hsm.ErrorOf(status, ""), dek.ErrUnavailable) {
		t.Error("unclassed errors must be unavailable")
	}
}

func TestFrames(t *testing.T) {
	var stream bytes.Buffer
	want := [][]byte{nil, []byte("a"), bytes.Repeat([]byte("b"), 70_000), []byte("c")}
	for i, body := range want {
		if err := hsm.WriteFrame(&stream, uint32(i), byte(i), body); err != nil {
			t.Fatal(err)
		}
	}
	for name, r := range map[string]io.Reader{"whole": bytes.NewReader(stream.Bytes()), "bytewise": iotest.OneByteReader(bytes.NewReader(stream.Bytes()))} {
		seqs, codes, bodies, err := hsm.ReadFrames(r)
		if !errors.Is(err, io.EOF) || len(seqs) != len(want) {
			t.Fatalf("%s: %d frames, %v", name, len(seqs), err)
		}
		for i := range want {
			if seqs[i] != uint32(i) || codes[i] != byte(i) || !bytes.Equal(bodies[i], want[i]) {
				t.Errorf("%s: frame %d differs", name, i)
			}
		}
	}
	for n := 1; n < 9; n++ {
		if _, _, _, err := hsm.ReadFrames(bytes.NewReader(stream.Bytes()[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d bytes: got %v, want unexpected EOF", n, err)
		}
	}
	for _, length := range []string{"00000000", "00000004", "00100001", "ffffffff"} {
		b, err := hex.DecodeString(length + "0000000000")
		if err != nil {
			t.Fatal(err)
		}
		if _, _, _, err := hsm.ReadFrames(bytes.NewReader(b)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("length %s: got %v", length, err)
		}
	}
}

// Frames carry keys: after use none is left in the reader.
func TestFrameReaderWipes(t *testing.T) {
	secret := []byte("thirty-two bytes that are a key!")
	var stream bytes.Buffer
	for _, size := range []int{0, 40_000, 80_000} {
		body := append(make([]byte, size), secret...)
		if err := hsm.WriteFrame(&stream, 1, 0, body); err != nil {
			t.Fatal(err)
		}
	}
	for name, r := range map[string]io.Reader{"whole": bytes.NewReader(stream.Bytes()), "halves": iotest.HalfReader(bytes.NewReader(stream.Bytes()))} {
		if bytes.Contains(hsm.FrameReaderBuffer(r), secret[:8]) {
			t.Errorf("%s: a key is left in the buffer", name)
		}
	}
}

// A buffer that became too small keeps no key either.
func TestFrameWriterWipes(t *testing.T) {
	secret := []byte("thirty-two bytes that are a key!")
	if bytes.Contains(hsm.FrameWriterLeftover(secret, make([]byte, 100_000)), secret[:8]) {
		t.Error("a key is left in the outgrown buffer")
	}
}

func FuzzFrames(f *testing.F) {
	f.Add([]byte{0, 0, 0, 5, 0, 0, 0, 1, 6})
	f.Add([]byte{0, 0, 0, 7, 0, 0, 0, 1, 6, 1, 2, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		seqs, codes, bodies, err := hsm.ReadFrames(bytes.NewReader(b))
		if err == nil {
			t.Fatal("no end")
		}
		var again bytes.Buffer
		for i := range seqs {
			if err := hsm.WriteFrame(&again, seqs[i], codes[i], bodies[i]); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.HasPrefix(b, again.Bytes()) {
			t.Error("parse and encode differ")
		}
	})
}

// roundTrip wants bytes that parse to encode to themselves.
func roundTrip(f *testing.F, parse func([]byte) ([]byte, error), seeds ...string) {
	f.Helper()
	if len(seeds) == 0 {
		f.Fatal("no seeds")
	}
	for _, s := range seeds {
		b, err := hex.DecodeString(s)
		if err != nil {
			f.Fatal(err)
		}
		if again, err := parse(b); err != nil || !bytes.Equal(b, again) {
			f.Fatalf("seed %s: %x, %v", s, again, err)
		}
		f.Add(b)
		f.Add(append(b, 0))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		again, err := parse(b)
		if err != nil && again != nil {
			t.Error("result and error")
		}
		if err == nil && !bytes.Equal(b, again) {
			t.Errorf("%x became %x", b, again)
		}
	})
}

func FuzzHello(f *testing.F) {
	roundTrip(f, hsm.ParseHello, "00052f6d2e736f"+"0007706b637331313a"+"00022f70"+"0000"+"0001610001620001630001640000"+"0002"+"0000000077359400")
}

func FuzzCapabilities(f *testing.F) {
	roundTrip(f, hsm.ParseCapabilities, "0000"+"00000000", "020102"+"0308000c001000"+"01010001")
}

func FuzzRSASealed(f *testing.F) {
	roundTrip(f, hsm.ParseRSASealed, "0101"+"0002aabb"+"0001cc", "0202"+"0001aa"+"0003ccddee")
}

// Golden vector of FORMAT.md, algorithm 2.
func TestRSASealedGolden(t *testing.T) {
	root := dek.ObjectID([]byte("0123456789abcdef"))
	place, err := dek.Binding{Purpose: dek.PurposeSealKey, Vault: "acme", Object: "seal", Version: 3}.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	sealed, digest := hsm.RSASealedForm(root, place, bytes.Repeat([]byte{0xc1}, 4), bytes.Repeat([]byte{0x51}, 3))
	signer := hsm.SealSignerID(root)
	got := fmt.Sprintf("sealed %x\ndigest %x\nsigner %x\n", sealed, digest, signer)
	const path = "testdata/sealed-rsa.golden"
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || got != string(want) {
		t.Errorf("got\n%swant (%v)\n%s", got, err, want)
	}
}

func TestURI(t *testing.T) {
	parts, slot, err := hsm.URIParts("pkcs11:token=The%20token;serial=0a1b;model=M;manufacturer=a%3bb;slot-id=7?pin-source=file:///etc/pin")
	if want := [5]string{"The token", "0a1b", "M", "a;b", "/etc/pin"}; err != nil || parts != want || slot != 7 {
		t.Errorf("got %q %d, %v; want %q", parts, slot, err, want)
	}
	for _, s := range []string{"", "pkcs11", "PKCS11:token=a", "pkcs11:", "pkcs11:model=a", "pkcs11:token=", "pkcs11:token",
		"pkcs11:token=a;token=b", "pkcs11:token=%zz", "pkcs11:token=a;object=b", "pkcs11:token=a;slot-id=-1",
		"pkcs11:token=a;slot-id=99999999999", "pkcs11:token=a?pin-source=relative", "pkcs11:token=a?module-path=/x"} {
		if err := hsm.CheckURI(s); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("%q: got %v, want ErrInvalid", s, err)
		}
	}
	err = hsm.CheckURI("pkcs11:token=a?pin-value=493170")
	if !errors.Is(err, dek.ErrInvalid) || strings.Contains(err.Error(), "493170") {
		t.Errorf("PIN in a URI: %v", err)
	}
}

func FuzzURI(f *testing.F) {
	for _, s := range []string{"pkcs11:token=a", "pkcs11:token=a;serial=b?pin-source=/x", "pkcs11:slot-id=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		parts, slot, err := hsm.URIParts(s)
		if err != nil && parts != [5]string{} {
			t.Error("result and error")
		}
		if err == nil && parts[0] == "" && parts[1] == "" && slot < 0 {
			t.Error("accepted a URI that names nothing")
		}
	})
}

// Only what crypto11 throws is recovered.
func TestGuard(t *testing.T) {
	cause := errors.New("CKR_DEVICE_ERROR")
	if err := hsm.Guard(func() error { panic(cause) }); !errors.Is(err, cause) {
		t.Errorf("error: got %v", err)
	}
	if err := hsm.Guard(func() error { return cause }); !errors.Is(err, cause) {
		t.Errorf("return: got %v", err)
	}
	for name, f := range map[string]func() error{
		"runtime error": func() error { var a []error; return a[len(os.Args)] },
		"our own":       func() error { panic("hsm: internal error: test") },
	} {
		func() {
			defer func() {
				r := recover()
				if r == nil {
					t.Errorf("%s was swallowed", name)
				}
				if _, ok := r.(runtime.Error); ok != (name == "runtime error") {
					t.Errorf("%s: %v", name, r)
				}
			}()
			_ = hsm.Guard(f)
		}()
	}
}

func TestLastWords(t *testing.T) {
	got := hsm.LastWords("C_Login(pin=493170)\nSIGSEGV: segmentation violation\nrax 0x123\nkeyward token child: no\ngoroutine 1\nSIG without end")
	if want := ": SIGSEGV: segmentation violation: keyward token child: no"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if n := len(hsm.LastWords(strings.Repeat("SIG"+strings.Repeat("x", 5000)+"\n", 100))); n > 500 {
		t.Errorf("kept %d bytes", n)
	}
}
