package hsm_test

import (
	"crypto"
	"slices"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/hsm/hsmtest"
	"github.com/miekg/pkcs11"
)

// tamper runs f on the token of cfg in this process, as an administrator with
// pkcs11-tool would, and ends its session.
func tamper(t *testing.T, cfg hsm.Config, f func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error) {
	t.Helper()
	for _, e := range cfg.Env {
		name, value, _ := strings.Cut(e, "=")
		t.Setenv(name, value)
	}
	p := pkcs11.New(cfg.Module)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(p.Initialize())
	defer p.Finalize()
	slots, err := p.GetSlotList(true)
	must(err)
	s, err := p.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	must(err)
	must(p.Login(s, pkcs11.CKU_USER, hsmtest.PIN))
	must(f(p, s))
}

// drop destroys the halves of one class.
func drop(id dek.ObjectID, class uint) func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
	return func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		if err := p.FindObjectsInit(s, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_ID, id[:])}); err != nil {
			return err
		}
		found, _, err := p.FindObjects(s, 10)
		if err != nil {
			return err
		}
		if err := p.FindObjectsFinal(s); err != nil {
			return err
		}
		for _, h := range found {
			if err := p.DestroyObject(s, h); err != nil {
				return err
			}
		}
		return nil
	}
}

// generate makes a pair as another program would, with more rights than ours.
func generate(id dek.ObjectID, private ...*pkcs11.Attribute) func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
	return func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		common := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, id[:]), pkcs11.NewAttribute(pkcs11.CKA_LABEL, "keyward-master")}
		_, _, err := p.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)},
			append(slices.Clone(common), pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true), pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, 2048), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1})),
			append(slices.Clone(common), private...))
		return err
	}
}

func flags(sensitive, extractable, decrypt, sign bool) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, sensitive),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, extractable), pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, decrypt),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN, sign), pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false),
	}
}

// Halves, duplicates and pairs with other rights are never used, are listed,
// and can be destroyed.
func TestNotQuiteAPair(t *testing.T) {
	tests := []struct {
		name   string
		made   bool // by GeneratePair first
		tamper func(id dek.ObjectID) func(*pkcs11.Ctx, pkcs11.SessionHandle) error
	}{
		{"private half missing", true, func(id dek.ObjectID) func(*pkcs11.Ctx, pkcs11.SessionHandle) error {
			return drop(id, pkcs11.CKO_PRIVATE_KEY)
		}},
		{"public half missing", true, func(id dek.ObjectID) func(*pkcs11.Ctx, pkcs11.SessionHandle) error {
			return drop(id, pkcs11.CKO_PUBLIC_KEY)
		}},
		{"duplicate", true, func(id dek.ObjectID) func(*pkcs11.Ctx, pkcs11.SessionHandle) error {
			return generate(id, flags(true, false, true, false)...)
		}},
		{"extractable", false, func(id dek.ObjectID) func(*pkcs11.Ctx, pkcs11.SessionHandle) error {
			return generate(id, flags(true, true, true, false)...)
		}},
		{"not sensitive", false, func(id dek.ObjectID) func(*pkcs11.Ctx, pkcs11.SessionHandle) error {
			return generate(id, flags(false, false, true, false)...)
		}},
		{"signs, too", false, func(id dek.ObjectID) func(*pkcs11.Ctx, pkcs11.SessionHandle) error {
			return generate(id, flags(true, false, true, true)...)
		}},
	}
	cfg := hsmtest.SoftHSM(t, "halves")
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			id := hsmtest.NewID()
			if tt.made {
				tok := hsmtest.Open(t, cfg)
				if _, err := tok.GeneratePair(t.Context(), id, 2048); err != nil {
					t.Fatal(err)
				}
				tok.Close()
			}
			tamper(t, cfg, tt.tamper(id))
			tok := hsmtest.Open(t, cfg)
			defer tok.Close()
			_, err := tok.FindPair(t.Context(), id)
			wantClass(t, "find", err, dek.ErrCorrupt)
			_, err = tok.GeneratePair(t.Context(), id, 2048)
			wantClass(t, "generate", err, dek.ErrExists)
			if tt.name == "duplicate" {
				_, err = tok.DecryptKey(t.Context(), id, crypto.SHA1, make([]byte, 256))
				wantClass(t, "decrypt", err, dek.ErrCorrupt)
			}
			ids, err := tok.Objects(t.Context())
			if err != nil || !slices.Contains(ids, id) {
				t.Errorf("objects: %x, %v", ids, err)
			}
			if err := tok.DestroyPair(t.Context(), id); err != nil {
				t.Errorf("destroy: %v", err)
			}
			_, err = tok.FindPair(t.Context(), id)
			wantClass(t, "find after", err, dek.ErrNotFound)
		})
	}
}

// A key that another process destroys is "not found", not an outage, and costs
// no restart; the kept handle is noticed to be stale.
func TestDestroyedElsewhere(t *testing.T) {
	f := openFaulty(t, nil)
	tamper(t, f.cfg, drop(f.id, pkcs11.CKO_PRIVATE_KEY))
	err := f.decrypt(t)
	if err == nil {
		t.Error("a destroyed key still decrypts")
	}
	wantClass(t, "decrypt", err, dek.ErrNotFound)
}
