package kms

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/keyward/keyward/dek"
)

// recordFound records what a crash kept out of the log, whose newest change is
// n: people may see those acts from now on, so they must not be lost unnoticed.
// What a restore has to know of them comes first, each as an act of its own.
func (s *Service) recordFound(ctx context.Context, n uint64) error {
	v, act := s.view.Load(), s.w.head.Act
	if n == act {
		return nil
	}
	var found []Event
	for path, at := range s.w.index {
		if e, ok := v.foundEvent(path); ok && at.change > n {
			e.Operation, e.Result, e.Change = opFoundChange, resultOK, at.change
			found = append(found, e)
		}
	}
	slices.SortFunc(found, func(a, b Event) int {
		return cmp.Or(cmp.Compare(a.Change, b.Change), strings.Compare(a.Object, b.Object), cmp.Compare(a.Version, b.Version))
	})
	last := Event{Operation: opFoundChange, Result: resultOK, Change: act, Note: "its outcome was not recorded before a crash"}
	if act == v.change {
		last.State = v.state
	}
	for _, e := range append(found, last) {
		if err := s.recordSystem(ctx, e); err != nil {
			return err
		}
	}
	return nil
}

// foundEvent describes a record that a restore of an older backup must not
// forget: a version (number and state), a vault, a denial.
func (v *view) foundEvent(path string) (Event, bool) {
	switch {
	case strings.HasPrefix(path, prefixVault):
		return Event{Object: vaultScope(path[len(prefixVault):])}, true
	case strings.HasPrefix(path, prefixDenied):
		return Event{Object: deniedObject, Note: path[len(prefixDenied):]}, true
	}
	kind, id, _ := strings.Cut(path, "/")
	id, n, ok := splitVersion(id)
	if kind+"/" != prefixKey && kind+"/" != prefixRing || !ok || n == 0 {
		return Event{}, false
	}
	vault, name := cutID(id)
	note := v.versionNote(kind, vault, name, n)
	return Event{Object: versionScope(kind, vault, name), Version: n, Note: note}, true
}

// deniedObject is the object of acts on the deny list.
const deniedObject = "/identities"

// The notes of acts that make versions say what a restore needs to keep their
// numbers from being given again: FORMAT.md, "Rollback".
const (
	keyNoteFormat  = "%d bits (%s)"
	ringNoteFormat = "server version %d, server key %d, master key %s (%s)"
)

// versionNote describes a version of a key or keyring; empty: there is none.
func (v *view) versionNote(kind, vault, name string, n dek.Version) string {
	if kind+"/" == prefixKey {
		return v.keyNote(vault, name, n)
	}
	return v.ringNote(vault, name, n)
}

func (v *view) keyNote(vault, name string, n dek.Version) string {
	k := v.key(vault, name)
	rec := k.version(n)
	if rec == nil {
		return ""
	}
	return fmt.Sprintf(keyNoteFormat, k.rec.Bits, rec.State.word())
}

func (v *view) ringNote(vault, name string, n dek.Version) string {
	r := v.ring(vault, name)
	rec := r.version(n)
	if rec == nil {
		return ""
	}
	return fmt.Sprintf(ringNoteFormat, rec.ServerVersion, r.rec.ServerKey, r.rec.MasterKey, rec.State.word())
}

func (s State) word() string {
	switch s {
	case Pending:
		return "pending"
	case Enabled:
		return "enabled"
	case Disabled:
		return wordDisabled
	case Failed:
		return "failed"
	case Destroyed:
		return "destroyed"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

const wordDisabled = "disabled"
