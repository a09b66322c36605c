package dek_test

import (
	"bytes"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/keyward/keyward/dek"
)

// secretBytes is a key that is easy to find in any output.
func secretBytes() []byte { return []byte("0123456789abcdefSECRETSECRETwxyz") }

func secretKey(t testing.TB) *dek.Key {
	t.Helper()
	k, err := dek.KeyFrom(secretBytes())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Destroy)
	return k
}

func TestKeyFrom(t *testing.T) {
	for _, n := range []int{0, 1, 31, 33, 64} {
		b := bytes.Repeat([]byte{1}, n)
		if k, err := dek.KeyFrom(b); !errors.Is(err, dek.ErrInvalid) || k != nil {
			t.Errorf("%d bytes: %v, %v, want ErrInvalid", n, k, err)
		}
		if !bytes.Equal(b, make([]byte, n)) {
			t.Errorf("%d bytes: refused but not wiped", n)
		}
	}
	b := secretBytes()
	k, err := dek.KeyFrom(b)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Destroy()
	if !bytes.Equal(b, make([]byte, dek.KeySize)) {
		t.Error("source not wiped")
	}
	err = k.Use(func(got []byte) error {
		if !bytes.Equal(got, secretBytes()) || cap(got) != dek.KeySize {
			t.Errorf("Use gave %d bytes, cap %d", len(got), cap(got))
		}
		return io.EOF
	})
	if err != io.EOF {
		t.Errorf("Use = %v, want the callback's error", err)
	}
}

func TestKeyDestroy(t *testing.T) {
	k, other := newKey(t), newKey(t)
	k.Destroy()
	k.Destroy()
	(*dek.Key)(nil).Destroy()
	calls := map[string]func() error{
		"Use":   func() error { return k.Use(func([]byte) error { return nil }) },
		"Clone": func() error { _, err := k.Clone(); return err },
		"Seal":  func() error { _, err := k.Seal(place(), nil); return err },
		"Open":  func() error { _, err := k.Open(place(), append([]byte{1}, make([]byte, 40)...)); return err },
	}
	for name, f := range calls {
		if err := f(); !errors.Is(err, dek.ErrDestroyed) {
			t.Errorf("%s = %v, want ErrDestroyed", name, err)
		}
	}
	if k.Equal(other) || other.Equal(k) || k.Equal(k) || other.Equal(nil) || (*dek.Key)(nil).Equal(other) {
		t.Error("a destroyed or nil key equals something")
	}
}

func TestKeyCloneEqual(t *testing.T) {
	k := newKey(t)
	c, err := k.Clone()
	if err != nil {
		t.Fatal(err)
	}
	if !k.Equal(c) || !k.Equal(k) || k.Equal(newKey(t)) {
		t.Error("Equal is wrong")
	}
	k.Destroy()
	if err := c.Use(func([]byte) error { return nil }); err != nil {
		t.Errorf("clone after Destroy of the first: %v", err)
	}
	c.Destroy()
}

// TestKeyDestroyInUse destroys a key inside its own nested uses: the bytes
// must stay until the outermost ends, and be gone after it.
func TestKeyDestroyInUse(t *testing.T) {
	k := secretKey(t)
	before := dek.Memory().Keys
	err := k.Use(func(outer []byte) error {
		return k.Use(func(inner []byte) error {
			k.Destroy()
			if !bytes.Equal(outer, secretBytes()) || !bytes.Equal(inner, secretBytes()) {
				t.Error("wiped under a running use")
			}
			if err := k.Use(func([]byte) error { return nil }); !errors.Is(err, dek.ErrDestroyed) {
				t.Errorf("new use after Destroy: %v", err)
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := dek.Memory().Keys; got != before-1 {
		t.Errorf("slots in use = %d, want %d", got, before-1)
	}
}

// TestKeyUsePanic: a panic in the callback must not keep the key for ever.
func TestKeyUsePanic(t *testing.T) {
	k, before := secretKey(t), dek.Memory().Keys
	func() {
		defer func() { _ = recover() }()
		_ = k.Use(func([]byte) error { panic("in use") })
	}()
	k.Destroy()
	if got := dek.Memory().Keys; got != before-1 {
		t.Errorf("slots in use = %d, want %d", got, before-1)
	}
}

// TestKeyConcurrentDestroy races uses, seals and Destroy: a use sees the whole
// key or ErrDestroyed, and each slot comes back exactly once.
func TestKeyConcurrentDestroy(t *testing.T) {
	before := dek.Memory().Keys
	for range 200 {
		k, err := dek.KeyFrom(secretBytes())
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		start := make(chan struct{})
		for i := range 6 {
			wg.Go(func() {
				<-start
				var err error
				switch i % 3 {
				case 0:
					err = k.Use(func(b []byte) error {
						runtime.Gosched()
						if !bytes.Equal(b, secretBytes()) {
							t.Error("use saw a wiped key")
						}
						return nil
					})
				case 1:
					_, err = k.Seal(place(), nil)
				default:
					k.Destroy()
				}
				if err != nil && !errors.Is(err, dek.ErrDestroyed) {
					t.Error(err)
				}
			})
		}
		close(start)
		wg.Wait()
	}
	if got := dek.Memory().Keys; got != before {
		t.Errorf("slots in use = %d, want %d", got, before)
	}
}

// TestKeyForgotten: the collector gives back a key that nobody destroyed, its
// subkeys too.
func TestKeyForgotten(t *testing.T) {
	before := dek.Memory().Keys
	func() {
		k, err := dek.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.Seal(place(), nil); err != nil {
			t.Fatal(err)
		}
	}()
	for dek.Memory().Keys > before {
		if t.Context().Err() != nil {
			t.Fatal("forgotten key never came back")
		}
		runtime.GC()
		runtime.Gosched()
	}
}

func TestKeyUseAllocs(t *testing.T) {
	k := newKey(t)
	var sum byte
	f := func(b []byte) error { sum ^= b[0]; return nil }
	if n := testing.AllocsPerRun(100, func() { _ = k.Use(f) }); n != 0 {
		t.Errorf("Use allocates %v times, want 0", n)
	}
}

// TestKeyRedacted sends a key, alone and inside other values, through every
// printer, logger and encoder of the standard library.
func TestKeyRedacted(t *testing.T) {
	k := secretKey(t)
	type holder struct {
		Key  *dek.Key
		Keys []*dek.Key
		Any  any
		priv *dek.Key
	}
	h := holder{k, []*dek.Key{k}, k, k}
	var out bytes.Buffer
	for _, v := range []any{k, h, &h, h.Keys, map[string]*dek.Key{"k": k}, reflect.ValueOf(k), reflect.ValueOf(k).Elem()} {
		for _, verb := range "vdsqxXtbcoOUeEfFgGpT!z" {
			for _, flags := range []string{"", "+", "#", " ", "-40", "0", ".3", "# "} {
				fmt.Fprintf(&out, "%"+flags+string(verb)+"\n", v)
			}
		}
		fmt.Fprintln(&out, v)
		for _, handler := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
			slog.New(handler).Info("key", "key", v, slog.Group("g", "key", v), "err", fmt.Errorf("with %v", v))
		}
		if b, err := json.Marshal(v); err == nil {
			out.Write(b) // reflect.Value itself marshals to {}
		}
		_ = gob.NewEncoder(&out).Encode(v)
		_ = xml.NewEncoder(&out).Encode(v)
	}
	for name, f := range map[string]func() error{
		"json": func() error { _, err := json.Marshal(k); return err },
		"gob":  func() error { return gob.NewEncoder(&out).Encode(k) },
		"xml":  func() error { return xml.NewEncoder(&out).Encode(k) },
		"text": func() error { _, err := k.MarshalText(); return err },
		"bin":  func() error { _, err := k.MarshalBinary(); return err },
	} {
		if f() == nil {
			t.Errorf("%s encoded a key", name)
		}
	}
	checkNoSecret(t, out.String())
	if !strings.Contains(out.String(), "dek.Key(redacted)") {
		t.Error("no redacted text in the output")
	}
	_ = h.priv
}

// checkNoSecret looks for secretBytes in the forms printers write bytes in.
func checkNoSecret(t *testing.T, out string) {
	t.Helper()
	part := secretBytes()[16:22]
	dec := strings.Trim(fmt.Sprint(part), "[]")
	forms := []string{
		string(part), hex.EncodeToString(part), strings.ToUpper(hex.EncodeToString(part)), dec,
		strings.ReplaceAll(dec, " ", ","), strings.ReplaceAll(dec, " ", ", "), fmt.Sprintf("% x", part),
		"U1NFQ1JFV", // base64 of part of it
		fmt.Sprintf("%#v", part[:3])[7:20],
	}
	for _, f := range forms {
		if strings.Contains(out, f) {
			t.Errorf("output contains the key as %q", f)
		}
	}
}
