package hsm_test

import (
	"path/filepath"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/hsm/hsmtest"
)

// What a sealed key rests on is told from its bytes, for each kind of token.
func TestRestsOnRSA(t *testing.T) {
	t.Parallel()
	poor, shim := hsmtest.Misbehave(t, hsmtest.SoftHSM(t, "rests-poor"))
	shim.Set(hsmtest.Hide, 3)
	soft, err := hsm.OpenSoftware(filepath.Join(t.TempDir(), "token"))
	if err != nil {
		t.Fatal(err)
	}
	defer soft.Close()
	for _, tt := range []struct {
		name string
		tok  hsmtest.Token
		want bool
	}{
		{"software", soft, false},
		{"softhsm2", hsmtest.Open(t, hsmtest.SoftHSM(t, "rests")), false},
		{"without AES", hsmtest.Open(t, poor), true},
	} {
		root, b := hsmtest.NewID(), dek.Binding{Purpose: dek.PurposeSealKey, Vault: "v", Version: 1}
		if err := tt.tok.GenerateRoot(t.Context(), root); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		k, err := dek.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		defer k.Destroy()
		sealed, err := tt.tok.SealKey(t.Context(), root, b, k)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if got := hsm.RestsOnRSA(sealed); got != tt.want || got == tt.tok.Capabilities().AESGCM {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
		if hsm.RestsOnRSA(sealed[:8]) || hsm.RestsOnRSA(nil) {
			t.Errorf("%s: a stump rests on something", tt.name)
		}
	}
}
