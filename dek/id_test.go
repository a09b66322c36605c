package dek_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
)

func TestCheckName(t *testing.T) {
	for _, s := range []string{"a", "0", "hr", "a-b", "a--b", "x9", strings.Repeat("a", 63)} {
		if err := dek.CheckName("vault", s); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{
		"", "-", "-a", "a-", "A", "a_b", "a.b", "a/b", "..", "a b", "a\x00", "ä", "a\n", "%61", strings.Repeat("a", 64),
	} {
		err := dek.CheckName("vault", s)
		if !errors.Is(err, dek.ErrInvalid) || !strings.Contains(err.Error(), "vault") {
			t.Errorf("%q: %v, want ErrInvalid that names the field", s, err)
		}
	}
}

func TestIDStrings(t *testing.T) {
	h := goodHeader()
	for _, tt := range []struct{ got, want string }{
		{h.KeyringID.String(), "hr/payroll"},
		{h.KeyID.String(), "hr/payroll/3"},
		{h.Master.String(), "hr/main/2"},
		{dek.PurposePrivateKey.String(), "private-key"},
		{dek.Purpose(0).String(), "Purpose(0)"},
		{dek.MemorySecret.String() + dek.MemoryLocked.String() + dek.MemoryNone.String(), "memfd_secretmlocknone"},
	} {
		if tt.got != tt.want {
			t.Errorf("got %q, want %q", tt.got, tt.want)
		}
	}
}
