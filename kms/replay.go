package kms

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/keyward/keyward/dek"
)

// replay brings into the state what must outlive a rollback: every name and
// number that was given out after the backup (headers of pages and wraps name
// them, so they are never given again), and what was switched off, revoked or
// taken back.
func (st *restorer) replay() error {
	for _, e := range st.events {
		if err := st.reserve(e); err != nil {
			return err
		}
		if e.Result != resultOK {
			continue
		}
		kept, err := st.takeAway(e)
		if err != nil {
			return err
		}
		if kept != "" {
			st.report.KeptDisabled = append(st.report.KeptDisabled, kept)
		}
	}
	return nil
}

// maxReserved bounds the numbers that one event reserves: there is a change for
// each, so that more is no log of ours.
const maxReserved = 1 << 16

// reserve keeps the name or number that e gave out.
func (st *restorer) reserve(e Event) error {
	part := strings.Split(e.Object, "/")
	if len(part) < 3 || part[0] != "" || part[1] != "vaults" || dek.CheckName("vault", part[2]) != nil {
		return nil
	}
	if len(part) == 3 {
		if e.Operation == OpVaultCreate || e.Operation == opFoundChange {
			st.reserveVault(part[2])
		}
		return nil
	}
	if len(part) != 5 || dek.CheckName("name", part[4]) != nil {
		return nil
	}
	vault, name, n := part[2], part[4], e.Version
	have := 0
	switch part[3] + "/" {
	case prefixKey:
		if k := st.l.view.key(vault, name); k != nil {
			have = len(k.versions)
		}
	case prefixRing:
		if r := st.l.view.ring(vault, name); r != nil {
			have = len(r.versions)
		}
	default:
		return nil
	}
	if n == 0 && e.Result == ResultUnknown && makesVersion(e.Operation) {
		n = dek.Version(have + 1) // it may have made one, of one key one at a time
	}
	if int(n) <= have {
		return nil
	}
	if int(n)-have > maxReserved {
		return fmt.Errorf("%w: %s version %d: only %d were made before", dek.ErrCorrupt, e.Object, n, have)
	}
	st.reserveVault(vault)
	st.report.Reserved = append(st.report.Reserved, fmt.Sprintf("%s versions %d to %d", e.Object, have+1, n))
	if part[3]+"/" == prefixKey {
		return st.reserveKey(vault, name, n, e.Note)
	}
	return st.reserveRing(vault, name, n, e.Note)
}

func makesVersion(op Operation) bool {
	return op == OpKeyCreate || op == OpKeyRoll || op == OpKeyringCreate || op == OpKeyringRoll
}

func (st *restorer) reserveVault(name string) {
	if _, there := st.l.view.vaults.get(name); there || slices.Contains(st.lostVaults, name) {
		return
	}
	st.lostVaults = append(st.lostVaults, name)
	st.report.Reserved = append(st.report.Reserved, vaultScope(name))
}

// reserveKey adds FAILED versions up to n.
func (st *restorer) reserveKey(vault, name string, n dek.Version, note string) error {
	var bits int
	var state string
	_, _ = fmt.Sscanf(note, keyNoteFormat, &bits, &state)
	bits = or(bits, defaultBits) // the note of another act does not say it
	path, now := keyPath(vault, name), st.s.now()
	if st.l.view.key(vault, name) == nil {
		if err := st.put(path, &keyRecord{Bits: bits, Created: now}); err != nil {
			return err
		}
	}
	for i := dek.Version(len(st.l.view.key(vault, name).versions) + 1); i <= n; i++ {
		if err := st.put(versionPath(path, i), &keyVersionRecord{State: Failed, Created: now, Changed: now}); err != nil {
			return err
		}
	}
	return nil
}

// reserveRing adds FAILED versions up to n with the numbers that servers saw.
func (st *restorer) reserveRing(vault, name string, n dek.Version, note string) error {
	var server, serverKey uint32
	var master, state string
	// A note that says less leaves zeros: numbers follow from the rule below.
	_, _ = fmt.Sscanf(note, ringNoteFormat, &server, &serverKey, &master, &state)
	path, now := ringPath(vault, name), st.s.now()
	if st.l.view.ring(vault, name) == nil {
		if err := st.put(path, &ringRecord{MasterKey: master, ServerKey: serverKey, Created: now}); err != nil {
			return err
		}
	}
	for i := dek.Version(len(st.l.view.ring(vault, name).versions) + 1); i <= n; i++ {
		rec := &ringVersionRecord{State: Failed, ServerVersion: st.l.view.ring(vault, name).nextServer(), Created: now, Changed: now}
		if i == n {
			rec.ServerVersion = max(rec.ServerVersion, server)
		}
		if err := st.put(versionPath(path, i), rec); err != nil {
			return err
		}
	}
	return nil
}

// takeAway applies one act that removed a right.
func (st *restorer) takeAway(e Event) (kept string, err error) {
	part := strings.Split(e.Object, "/")
	off := e.Note == noteOf(false)
	if e.Operation == opFoundChange {
		off = strings.Contains(e.Note, "("+wordDisabled+")")
	}
	switch {
	case off && len(part) == 5 && part[3]+"/" == prefixKey && (e.Operation == OpKeySetEnabled || e.Operation == opFoundChange):
		return "key " + part[2] + "/" + part[4], st.disableKey(part[2], part[4], e.Version)
	case off && len(part) == 5 && part[3]+"/" == prefixRing && (e.Operation == OpKeyringSetState || e.Operation == opFoundChange):
		return "keyring " + part[2] + "/" + part[4], st.disableRing(part[2], part[4], e.Version)
	case e.Operation == OpIdentityRevoke, e.Operation == opFoundChange && e.Object == deniedObject:
		return "identity " + e.Note, st.put(prefixDenied+e.Note, &deniedRecord{st.s.now(), e.Principal})
	case e.Operation == OpInstanceRevoke && len(part) == 3:
		return st.replayInstanceRevoke(e, part[2])
	case e.Operation == OpGrantRemove:
		return st.replayGrantRemove(e)
	}
	return "", nil
}

func (st *restorer) replayInstanceRevoke(e Event, name string) (kept string, err error) {
	inst, ok := st.l.view.instances.get(name)
	if !ok {
		return "", nil
	}
	next, now := *inst, st.s.now()
	next.Revoked = now
	if err := st.put(prefixInst+name, &next); err != nil {
		return "", err
	}
	return "instance " + name, st.put(prefixDenied+inst.Principal, &deniedRecord{now, e.Principal})
}

func (st *restorer) replayGrantRemove(e Event) (kept string, err error) {
	quoted, err := strconv.QuotedPrefix(e.Note)
	if err != nil {
		return "", nil
	}
	role, err := strconv.Unquote(quoted)
	principal, ok := strings.CutPrefix(e.Note[len(quoted):], " from ")
	if err != nil || !ok {
		return "", nil
	}
	gone := Grant{Principal: principal, Role: role, Scope: e.Object}
	grants := st.l.view.grantsOf(principal)
	if !hasGrant(grants, gone) {
		return "", nil
	}
	rest := slices.DeleteFunc(slices.Clone(grants), gone.same)
	return "grant of " + quoted + " at " + e.Object + " to " + principal, st.put(prefixGrants+principal, &grantsRecord{rest})
}

func (st *restorer) disableKey(vault, name string, n dek.Version) error {
	k := st.l.view.key(vault, name)
	if k == nil {
		return nil
	}
	for i, r := range k.versions {
		if r.State != Enabled || n != 0 && n != dek.Version(i+1) {
			continue
		}
		next := *r
		next.State, next.Changed = Disabled, st.s.now()
		if err := st.put(versionPath(keyPath(vault, name), dek.Version(i+1)), &next); err != nil {
			return err
		}
	}
	return nil
}

func (st *restorer) disableRing(vault, name string, n dek.Version) error {
	r := st.l.view.ring(vault, name)
	if r == nil {
		return nil
	}
	for i, rec := range r.versions {
		if rec.State != Enabled || n != 0 && n != dek.Version(i+1) {
			continue
		}
		next := *rec
		next.State, next.Changed = Disabled, st.s.now()
		if err := st.put(versionPath(ringPath(vault, name), dek.Version(i+1)), &next); err != nil {
			return err
		}
	}
	return nil
}
