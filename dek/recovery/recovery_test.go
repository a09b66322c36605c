package recovery_test

import (
	"bytes"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/dek/recovery"
)

func place() dek.Binding {
	return dek.Binding{Purpose: dek.PurposeDEK, Vault: "hr", Object: "payroll", Version: 3}
}

func newKey(t testing.TB) *dek.Key {
	t.Helper()
	k, err := dek.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Destroy)
	return k
}

func generate(t testing.TB, m, n int) (recovery.Recipient, []recovery.Share) {
	t.Helper()
	r, shares, err := recovery.Generate(m, n, "board of Acme, 2026")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, s := range shares {
			s.Destroy()
		}
	})
	return r, shares
}

func TestField(t *testing.T) {
	// The product tables of FIPS 197 §4.2 and a slow model.
	if got := recovery.Mul(0x57, 0x83); got != 0xc1 {
		t.Errorf("57 * 83 = %02x, want c1", got)
	}
	for a := range 256 {
		for b := range 256 {
			want := 0
			for i := range 8 {
				if b>>i&1 == 1 {
					want ^= a << i
				}
			}
			for i := 15; i >= 8; i-- {
				if want>>i&1 == 1 {
					want ^= 0x11b << (i - 8)
				}
			}
			if got := recovery.Mul(byte(a), byte(b)); int(got) != want {
				t.Fatalf("%02x * %02x = %02x, want %02x", a, b, got, want)
			}
		}
		inv := recovery.Inverse(byte(a))
		if got := recovery.Mul(byte(a), inv); a != 0 && got != 1 || a == 0 && inv != 0 {
			t.Errorf("%02x * its inverse = %02x", a, got)
		}
	}
}

func TestGenerateRefuses(t *testing.T) {
	tests := []struct {
		m, n  int
		label string
	}{
		{1, 1, "x"}, {1, 3, "x"}, {0, 3, "x"}, {4, 3, "x"}, {2, 256, "x"}, {-1, 2, "x"},
		{2, 3, ""}, {2, 3, strings.Repeat("x", 64)}, {2, 3, "a\nb"}, {2, 3, "\xff"}, {2, 3, "\x1b[2J"},
	}
	for _, tt := range tests {
		if _, shares, err := recovery.Generate(tt.m, tt.n, tt.label); !errors.Is(err, dek.ErrInvalid) || shares != nil {
			t.Errorf("%d of %d, %q: %v, want ErrInvalid", tt.m, tt.n, tt.label, err)
		}
	}
}

// TestSplitUniform: over many splits of one secret its shares take every value
// alike, so a share alone says nothing of it.
func TestSplitUniform(t *testing.T) {
	secret := newKey(t)
	var seen [256]int
	const rounds = 500
	for range rounds {
		shares, err := recovery.Split(secret, 2, 2)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range shares {
			_ = s.Use(func(b []byte) error {
				for _, v := range b {
					seen[v]++
				}
				return nil
			})
			s.Destroy()
		}
	}
	// 32,000 bytes: 125 of each value; 60 or 200 is beyond five sigma.
	for v, n := range seen {
		if n < 60 || n > 200 {
			t.Errorf("share byte %02x came %d times of %d", v, n, rounds*64)
		}
	}
}

// subsets calls f with every choice of size out of n numbers.
func subsets(n, size int, f func([]int)) {
	var pick func(from int, chosen []int)
	pick = func(from int, chosen []int) {
		if len(chosen) == size {
			f(chosen)
			return
		}
		for i := from; i < n; i++ {
			pick(i+1, append(slices.Clone(chosen), i))
		}
	}
	pick(0, nil)
}

// TestEverySubset: all choices of m or more shares open, in any order; all
// smaller ones get the one error.
func TestEverySubset(t *testing.T) {
	for _, mn := range [][2]int{{2, 2}, {2, 3}, {3, 5}, {5, 5}} {
		m, n := mn[0], mn[1]
		r, shares := generate(t, m, n)
		k := newKey(t)
		sealed, err := r.Seal(place(), k)
		if err != nil {
			t.Fatal(err)
		}
		for size := range n + 1 {
			subsets(n, size, func(chosen []int) {
				var part []recovery.Share
				for _, i := range chosen {
					part = append([]recovery.Share{shares[i]}, part...)
				}
				p, err := recovery.Combine(part)
				if size < m {
					if !errors.Is(err, dek.ErrAuth) || p != nil {
						t.Errorf("%d of %d: shares %v: %v, want ErrAuth", m, n, chosen, err)
					}
					return
				}
				if err != nil {
					t.Fatalf("%d of %d: shares %v: %v", m, n, chosen, err)
				}
				defer p.Destroy()
				got, err := p.Open(place(), sealed)
				if err != nil {
					t.Fatal(err)
				}
				defer got.Destroy()
				if !got.Equal(k) || p.Fingerprint() != r.Fingerprint() {
					t.Errorf("%d of %d: shares %v opened another key", m, n, chosen)
				}
			})
		}
	}
}

// flip returns a share with one bit of its value changed.
func flip(t *testing.T, s recovery.Share) recovery.Share {
	t.Helper()
	b := make([]byte, dek.KeySize)
	_ = s.Y().Use(func(y []byte) error { copy(b, y); return nil })
	b[5] ^= 4
	y, err := dek.KeyFrom(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(y.Destroy)
	return s.WithY(y)
}

// TestCombineRefuses: one error, one text, no key.
func TestCombineRefuses(t *testing.T) {
	_, s := generate(t, 3, 5)
	_, foreign := generate(t, 3, 5)
	dead, err := s[3].Y().Clone()
	if err != nil {
		t.Fatal(err)
	}
	dead.Destroy()
	tests := map[string][]recovery.Share{
		"none":              nil,
		"zero":              {{}, {}, {}},
		"too few":           s[:2],
		"one twice":         {s[0], s[1], s[1]},
		"one twice, enough": {s[0], s[1], s[2], s[1]},
		"foreign":           {s[0], s[1], foreign[2]},
		"foreign beyond m":  {s[0], s[1], s[2], foreign[3]},
		"flipped":           {s[0], flip(t, s[1]), s[2]},
		"flipped beyond m":  {s[0], s[1], s[2], flip(t, s[3])},
		"index zero":        {s[0], s[1].WithIndex(0), s[2]},
		"other index":       {s[0], s[1].WithIndex(4), s[2]},
		"claims m = 2":      {s[0].WithM(2), s[1].WithM(2)},
		"destroyed":         {s[0], s[1], s[3].WithY(dead)},
	}
	texts := make(map[string]bool)
	for name, shares := range tests {
		p, err := recovery.Combine(shares)
		if !errors.Is(err, dek.ErrAuth) || p != nil {
			t.Errorf("%s: %v, %v, want ErrAuth and no key", name, p, err)
			continue
		}
		texts[err.Error()] = true
	}
	if len(texts) != 1 {
		t.Errorf("%d different answers, want one: %v", len(texts), texts)
	}
}

func TestOpenRefuses(t *testing.T) {
	r, shares := generate(t, 2, 3)
	p, err := recovery.Combine(shares[1:])
	if err != nil {
		t.Fatal(err)
	}
	defer p.Destroy()
	other, _ := generate(t, 2, 3)
	foreign, err := other.Seal(place(), newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	good, err := r.Seal(place(), newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	moved := place()
	moved.Version++
	elsewhere := place()
	elsewhere.Vault = "evil"
	tests := []struct {
		name   string
		b      dek.Binding
		sealed []byte
		want   error
	}{
		{"good", place(), good, nil},
		{"other version", moved, good, dek.ErrAuth},
		{"other vault", elsewhere, good, dek.ErrAuth},
		{"no purpose", dek.Binding{}, good, dek.ErrInvalid},
		{"foreign", place(), foreign, dek.ErrAuth},
		{"empty", place(), nil, dek.ErrAuth},
		{"head only", place(), good[:13], dek.ErrAuth},
		{"cut", place(), good[:len(good)-1], dek.ErrAuth},
		{"longer", place(), append(bytes.Clone(good), 0), dek.ErrAuth},
	}
	for _, i := range []int{0, 1, 12, 13, 1000, 1600, len(good) - 1} {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		tests = append(tests, struct {
			name   string
			b      dek.Binding
			sealed []byte
			want   error
		}{fmt.Sprint("byte ", i), place(), bad, dek.ErrAuth})
	}
	for _, tt := range tests {
		k, err := p.Open(tt.b, tt.sealed)
		if !errors.Is(err, tt.want) || (k == nil) != (tt.want != nil) {
			t.Errorf("%s: %v, %v, want %v", tt.name, k, err, tt.want)
		}
		k.Destroy()
	}
	p.Destroy()
	if _, err := p.Open(place(), good); !errors.Is(err, dek.ErrDestroyed) {
		t.Errorf("Open after Destroy: %v, want ErrDestroyed", err)
	}
	if _, err := (recovery.Recipient{}).Seal(place(), newKey(t)); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("zero recipient: %v, want ErrInvalid", err)
	}
}

func TestRecipientText(t *testing.T) {
	r, _ := generate(t, 3, 5)
	got, err := recovery.ParseRecipient(" " + r.String() + "\n")
	if err != nil {
		t.Fatal(err)
	}
	m, n := got.Threshold()
	if got.String() != r.String() || got.Fingerprint() != r.Fingerprint() || got.Label() != r.Label() || m != 3 || n != 5 {
		t.Errorf("came back as %s, %d of %d, %q", got.Fingerprint(), m, n, got.Label())
	}
	b, err := json.Marshal(struct{ A, Zero recovery.Recipient }{A: r})
	if err != nil {
		t.Fatal(err)
	}
	var back struct{ A, Zero recovery.Recipient }
	if err := json.Unmarshal(b, &back); err != nil || back.A.String() != r.String() || back.Zero.String() != "" {
		t.Errorf("JSON round trip: %v", err)
	}
	s := r.String()
	bad := []string{"", "kwrecipient1-", "kwrecipient2" + s[12:], s[:len(s)-1], s + "A", s + "====", s[:500] + "\n" + s[500:],
		s[:40] + "!" + s[41:], strings.Repeat(s, 2)}
	for i := len("kwrecipient1-"); i < len(s); i += 97 {
		c := byte('A')
		if s[i] == c {
			c = 'B'
		}
		bad = append(bad, s[:i]+string(c)+s[i+1:])
	}
	for _, s := range bad {
		if r, err := recovery.ParseRecipient(s); !errors.Is(err, dek.ErrInvalid) || r.String() != "" {
			t.Errorf("%.30q (%d characters): %v, want ErrInvalid", s, len(s), err)
		}
	}
}

// TestSecretsRedacted sends shares and private halves through printers,
// loggers and encoders.
func TestSecretsRedacted(t *testing.T) {
	_, shares := generate(t, 2, 2)
	known, err := dek.KeyFrom([]byte("0123456789abcdefSECRETSECRETwxyz"))
	if err != nil {
		t.Fatal(err)
	}
	defer known.Destroy()
	p, err := recovery.Combine(shares)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Destroy()
	share := shares[0].WithY(known)
	var out bytes.Buffer
	for _, v := range []any{share, &share, []recovery.Share{share}, p, *p, struct{ S any }{share}} {
		for _, verb := range "vdsqxXtbcoUepT!" {
			for _, flags := range []string{"", "+", "#", " "} {
				fmt.Fprintf(&out, "%"+flags+string(verb)+"\n", v)
			}
		}
		slog.New(slog.NewTextHandler(&out, nil)).Info("x", "v", v)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "v", v)
	}
	for _, part := range []string{"SECRET", hex.EncodeToString([]byte("SECRET")), "83 69 67", "83,69,67", "U0VDUkVU"} {
		if strings.Contains(out.String(), part) {
			t.Errorf("output contains the secret as %q", part)
		}
	}
	for _, v := range []any{share, p} {
		if _, err := json.Marshal(v); err == nil {
			t.Errorf("json encoded %T", v)
		}
		if err := gob.NewEncoder(&out).Encode(v); err == nil {
			t.Errorf("gob encoded %T", v)
		}
	}
}

func BenchmarkSealOpen(b *testing.B) {
	r, shares := generate(b, 3, 5)
	p, err := recovery.Combine(shares[:3])
	if err != nil {
		b.Fatal(err)
	}
	defer p.Destroy()
	k := newKey(b)
	sealed, err := r.Seal(place(), k)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("seal", func(b *testing.B) {
		for b.Loop() {
			if _, err := r.Seal(place(), k); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			got, err := p.Open(place(), sealed)
			if err != nil {
				b.Fatal(err)
			}
			got.Destroy()
		}
	})
	b.Logf("a copy takes %d bytes", len(sealed))
}
