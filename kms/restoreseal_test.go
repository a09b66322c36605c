package kms_test

import (
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/keyward/keyward/kms"
)

// TestRestoreNewSealKeys: nobody knows how much a seal key sealed after the
// backup, so that none of them seals again after a restore.
func TestRestoreNewSealKeys(t *testing.T) {
	text, private := people(t)
	for _, fresh := range []bool{false, true} {
		t.Run(fmt.Sprint("fresh token ", fresh), func(t *testing.T) {
			h := newHouse(t, text)
			h.furnish()
			want := h.bytesOf(h.wraps()[0])
			b := h.backup()
			h.s.Close()
			n := h.elsewhere(fresh)
			var opt kms.RestoreOptions
			if fresh {
				opt.Private = private
			}
			_, err := n.restore(b, opt)
			check(t, err)
			records := snapshot(t, n.store)
			for _, path := range []string{"head", "system", "vaults/v"} { // FORMAT.md, "Records"
				if v := binary.BigEndian.Uint32(records[path].Value[1:]); v != 2 {
					t.Errorf("record %s is sealed by system seal key %d, want 2", path, v)
				}
			}
			n.open()
			if v := must(n.s.Vaults(t.Context(), officer)); v[0].SealVersion != 2 {
				t.Errorf("seal key of the vault: version %d, want 2", v[0].SealVersion)
			}
			_, err = n.s.RollKeyring(t.Context(), officer, kms.RollKeyring{Vault: "v", Name: "r"})
			check(t, err)
			ws := n.wraps()
			if v := ws[1].Header().SealVersion; v != 2 {
				t.Errorf("a new wrap is under seal key %d, want 2", v)
			}
			if got := n.bytesOf(ws[0]); string(got) != string(want) {
				t.Error("another key after the restore")
			}
			n.reopen()
			n.bytesOf(ws[1])
		})
	}
}
