package recovery_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/dek/recovery"
)

func text(t testing.TB, s recovery.Share) string {
	t.Helper()
	b, err := s.Text()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestShareText(t *testing.T) {
	r, shares := generate(t, 2, 12)
	for _, i := range []int{0, 8, 9, 11} {
		s := text(t, shares[i])
		for _, typed := range []string{
			s, strings.ToUpper(s), " " + s + "\r\n", strings.ReplaceAll(s, "0", "O"), strings.ReplaceAll(s[9:], "1", "l"),
			s[:12] + strings.ReplaceAll(s[12:], "-", ""), s[:12] + strings.ReplaceAll(s[12:], "-", " - "),
		} {
			if !strings.HasPrefix(strings.ToLower(strings.TrimSpace(typed)), "kwshare1-") {
				typed = "kwshare1-" + typed
			}
			if j := strings.Index(typed, "-"); strings.Contains(typed[j+1:j+3], "l") || strings.Contains(typed[j+1:j+3], "O") {
				continue // the number itself is written in digits
			}
			got, err := recovery.ParseShare([]byte(typed))
			if err != nil {
				t.Errorf("%d: %v", i+1, err)
				continue
			}
			m, n := got.Threshold()
			if text(t, got) != s || got.Index() != i+1 || m != 2 || n != 12 || got.Fingerprint() != r.Fingerprint() {
				t.Errorf("share %d came back as %d, %d of %d", i+1, got.Index(), m, n)
			}
			got.Destroy()
		}
	}
	gone := shares[3]
	gone.Destroy()
	if b, err := gone.Text(); !errors.Is(err, dek.ErrDestroyed) || b != nil {
		t.Errorf("Text after Destroy: %q, %v", b, err)
	}
	if b, err := (recovery.Share{}).Text(); !errors.Is(err, dek.ErrDestroyed) || b != nil {
		t.Errorf("Text of the zero share: %q, %v", b, err)
	}
}

// TestShareTyping makes every single-character mistake and every swap of
// neighbours: each is found, named by the share's number, and not repeated.
func TestShareTyping(t *testing.T) {
	_, shares := generate(t, 2, 3)
	s := text(t, shares[1])
	start := strings.Index(s, "-2-") + len("-2-")
	mistake := func(typed string) {
		t.Helper()
		got, err := recovery.ParseShare([]byte(typed))
		if !errors.Is(err, dek.ErrInvalid) || got != (recovery.Share{}) {
			t.Fatalf("%q: %v, want ErrInvalid", typed, err)
		}
		if !strings.Contains(err.Error(), "share 2:") {
			t.Errorf("error %q does not name the share", err)
		}
		if body := strings.Split(typed[start:], "-"); strings.Contains(err.Error(), body[0]) {
			t.Errorf("error %q repeats the share", err)
		}
	}
	for i := start; i < len(s); i++ {
		if s[i] == '-' {
			continue
		}
		for _, c := range []byte("0123456789abcdefghjkmnpqrstvwxyz u!\x00\xff") {
			if c != s[i] {
				mistake(s[:i] + string(rune(c)) + s[i+1:])
			}
		}
		mistake(s[:i] + s[i+1:])
		mistake(s[:i] + s[i:i+1] + s[i:])
		if i+1 < len(s) && s[i+1] != '-' && s[i] != s[i+1] {
			mistake(s[:i] + s[i+1:i+2] + s[i:i+1] + s[i+2:])
		}
	}
	for _, bad := range []string{
		"", "kwshare1-", "kwshare1-2", "kwshare2" + s[8:], "kwshare1-0-" + s[start:], "kwshare1-02-" + s[start:],
		"kwshare1-256-" + s[start:], "kwshare1-99999999999999999999-" + s[start:], "kwshare1--" + s[start:],
		"kwshare1-3-" + s[start:], "kwshare1-200-" + s[start:], s + s, "x" + s, strings.Repeat("kwshare1-", 200),
	} {
		if _, err := recovery.ParseShare([]byte(bad)); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("%.40q: %v, want ErrInvalid", bad, err)
		}
	}
}

func FuzzParseShare(f *testing.F) {
	seeds := 0
	for _, s := range goldenShares(f) {
		f.Add([]byte(s))
		f.Add([]byte(strings.ToUpper(s)))
		seeds += 2
	}
	if seeds < 10 {
		f.Fatalf("%d seeds, want the golden shares", seeds)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := recovery.ParseShare(b)
		if err != nil {
			if !errors.Is(err, dek.ErrInvalid) || s != (recovery.Share{}) {
				t.Fatalf("share and error: %v", err)
			}
			return
		}
		defer s.Destroy()
		canonical := text(t, s)
		again, err := recovery.ParseShare([]byte(canonical))
		if err != nil {
			t.Fatalf("own text refused: %v", err)
		}
		defer again.Destroy()
		if text(t, again) != canonical || !again.Y().Equal(s.Y()) {
			t.Error("a share changed on the way through its text")
		}
		if _, err := recovery.Combine([]recovery.Share{s}); !errors.Is(err, dek.ErrAuth) {
			t.Errorf("one share joins: %v", err)
		}
	})
}

func FuzzParseRecipient(f *testing.F) {
	f.Add(goldenRecipient(f))
	f.Add("kwrecipient1-AgMBeA")
	f.Fuzz(func(t *testing.T, s string) {
		r, err := recovery.ParseRecipient(s)
		if err != nil {
			if !errors.Is(err, dek.ErrInvalid) || r.String() != "" {
				t.Fatalf("recipient and error: %v", err)
			}
			return
		}
		if r.String() != strings.TrimSpace(s) {
			t.Error("parse and encode changed the text")
		}
	})
}

// FuzzOpen: no bytes open but those that Seal made.
func FuzzOpen(f *testing.F) {
	golden := readGolden(f)
	p := golden.private(f)
	for _, c := range golden.Copies {
		f.Add([]byte(c.Sealed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := p.Open(golden.Copies[0].binding(), b)
		defer k.Destroy()
		if isGolden := bytes.Equal(b, golden.Copies[0].Sealed); (err == nil) != isGolden || (k == nil) != (err != nil) {
			t.Errorf("Open of %d bytes: %v, %v", len(b), k, err)
		}
	})
}
