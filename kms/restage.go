package kms

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/keyward/keyward/dek"
)

// A previousLog is an audit log that a restore ended; agents may still hold
// its checkpoints.
type previousLog struct {
	Name     string `json:"name"`   // first line of its checkpoints
	Change   uint64 `json:"change"` // newest change of state that was restored
	Accepted bool   `json:"accepted,omitempty"`
}

// stage turns the verified state into the one that will be stored.
func (st *restorer) stage(ctx context.Context) error {
	s, v := st.s, st.l.view
	s.w = st.l.w
	s.view.Store(v)
	if err := st.stageSeal(ctx); err != nil {
		return err
	}
	for _, e := range sorted(&v.tokens, "") {
		if e.value.Used.IsZero() { // it may have been used after the backup
			if err := st.drop(prefixToken + e.key); err != nil {
				return err
			}
		}
	}
	if err := st.replay(); err != nil {
		return fmt.Errorf("replay the audit log: %w", err)
	}
	if err := st.stageSystem(ctx); err != nil {
		return err
	}
	if err := st.stageVaults(ctx); err != nil {
		return err
	}
	if err := st.stageLostVaults(ctx); err != nil {
		return err
	}
	if st.opt.Private == nil {
		return nil
	}
	if err := st.stageBoot(ctx); err != nil {
		return err
	}
	for _, e := range sorted(&v.keys, "") {
		if err := st.stageKey(ctx, e.key); err != nil {
			return fmt.Errorf("key %s: %w", e.key, err)
		}
	}
	return nil
}

func (st *restorer) stageSystem(ctx context.Context) error {
	next := st.l.view.system
	next.Restored = st.s.now()
	if st.opt.Recipient != "" {
		next.Recipient = st.opt.Recipient
	}
	if st.newLog() {
		next.Previous = append(slices.Clone(next.Previous), previousLog{
			Name: firstLine(st.report.Checkpoint), Change: st.report.Change, Accepted: st.opt.AcceptRollback,
		})
	}
	if err := st.put(pathSystem, &next); err != nil {
		return err
	}
	key, err := st.s.auditKey(ctx, st.mark.Audit)
	st.l.view.boot.Audit, st.l.view.boot.AuditKey = st.mark.Audit, key
	return err
}

// stageBoot moves the system seal key under the new root.
func (st *restorer) stageBoot(ctx context.Context) error {
	boot := &st.l.view.boot
	boot.CA = st.mark.CA
	var err error
	boot.Seals, err = st.moveSeals(ctx, "", boot.Seals)
	boot.Root = st.mark.Root
	return err
}

// stageLostVaults makes vaults anew whose records are lost: their names stay
// taken, and there is a place for the numbers of what was in them.
func (st *restorer) stageLostVaults(ctx context.Context) error {
	for _, name := range st.lostVaults {
		sv, err := st.newSeal(ctx, name, 1)
		if err != nil {
			return fmt.Errorf("vault %s: %w", name, err)
		}
		rec := &vaultRecord{Created: st.s.now(), Seals: []sealVersion{sv}, Reserved: st.s.cfg.limits.block}
		if err := st.put(vaultPath(name), rec); err != nil {
			return err
		}
	}
	return nil
}

// stageSeal makes the next version of the system seal key: how much the current
// one has sealed since the backup is not known.
func (st *restorer) stageSeal(ctx context.Context) error {
	boot, w := &st.l.view.boot, st.s.w
	next := w.sealer.current + 1
	sv, err := st.newSeal(ctx, "", next)
	if err != nil {
		return fmt.Errorf("system seal key: %w", err)
	}
	boot.Seals = append(slices.Clone(boot.Seals), sv)
	key, _ := st.s.seals.Load(string(sv.Sealed))
	w.sealer.keys[next] = key.(*dek.Key)
	w.sealer.current, w.sealer.used, w.head.Reserved = next, 0, 0
	return nil
}

// stageVaults gives every vault the next version of its seal key, for the same
// reason, and, with a new token, moves the older ones under its root.
func (st *restorer) stageVaults(ctx context.Context) error {
	for _, e := range sorted(&st.l.view.vaults, "") {
		next := *e.value
		if st.opt.Private != nil {
			var err error
			if next.Seals, err = st.moveSeals(ctx, e.key, next.Seals); err != nil {
				return fmt.Errorf("vault %s: %w", e.key, err)
			}
		}
		sv, err := st.newSeal(ctx, e.key, next.Seals[len(next.Seals)-1].Version+1)
		if err != nil {
			return fmt.Errorf("vault %s: %w", e.key, err)
		}
		next.Seals, next.Reserved = append(slices.Clone(next.Seals), sv), restoreReserve
		st.s.sealUses.Store(e.key, &sealUse{known: true, sealed: string(sv.Sealed), reserved: next.Reserved})
		if err := st.put(vaultPath(e.key), &next); err != nil {
			return err
		}
	}
	return nil
}

// newSeal makes a seal key version under the root that will be.
func (st *restorer) newSeal(ctx context.Context, vault string, n dek.Version) (sealVersion, error) {
	k, err := dek.NewKey()
	if err != nil {
		return sealVersion{}, err
	}
	sv, err := st.s.sealSeal(ctx, dek.ObjectID(st.mark.Root), vault, n, k)
	if err != nil {
		k.Destroy()
		return sealVersion{}, err
	}
	st.s.keepSeal(sv.Sealed, k)
	return sv, nil
}

// moveSeals seals the same keys under the new root.
func (st *restorer) moveSeals(ctx context.Context, vault string, old []sealVersion) ([]sealVersion, error) {
	var out []sealVersion
	for _, sv := range old {
		k, err := st.s.openSeal(ctx, dek.ObjectID(st.l.view.boot.Root), vault, sv)
		if err != nil {
			return nil, err
		}
		moved, err := st.s.sealSeal(ctx, dek.ObjectID(st.mark.Root), vault, sv.Version, k)
		if err != nil {
			return nil, err
		}
		c, err := k.Clone()
		if err != nil {
			return nil, err
		}
		st.s.keepSeal(moved.Sealed, c)
		out = append(out, moved)
	}
	return out, nil
}

// stageKey makes one new version of a master key in the new token, wraps every
// DEK of its keyrings for it, and leaves tombstones of the versions that went
// with the old token. What was switched off stays off.
func (st *restorer) stageKey(ctx context.Context, id string) error {
	s, v := st.s, st.l.view
	vault, name := cutID(id)
	k := v.key(vault, name)
	if k.neverWas() {
		return nil
	}
	object, ok := st.mark.Masters[id]
	if !ok {
		return fmt.Errorf("kms: internal error: no object was chosen for it")
	}
	off := k.current() == 0 && !slices.ContainsFunc(k.versions, func(r *keyVersionRecord) bool { return r.State == Pending })
	was := make(map[dek.Version]State)
	now := s.now()
	for i, r := range k.versions {
		was[dek.Version(i+1)] = r.State
		if r.State == Failed || r.State == Destroyed {
			continue
		}
		gone := *r
		gone.State, gone.Changed = Destroyed, now
		if err := st.put(versionPath(keyPath(vault, name), dek.Version(i+1)), &gone); err != nil {
			return err
		}
	}
	m := dek.MasterID{Vault: vault, Key: name, Version: dek.Version(len(k.versions) + 1)}
	path := versionPath(keyPath(vault, name), m.Version)
	pub, err := s.findOrMake(ctx, dek.ObjectID(object), k.rec.Bits, true)
	if err == nil {
		err = s.testPair(ctx, dek.ObjectID(object), pub)
	}
	if err != nil {
		return err
	}
	rec := &keyVersionRecord{State: Enabled, Object: object, Created: now, Changed: now, SPKI: marshalSPKI(pub)}
	if err := st.put(path, rec); err != nil {
		return err
	}
	st.report.NewKeys++
	if err := st.stageRings(ctx, m, was); err != nil || !off {
		return err
	}
	rec.State = Disabled
	st.report.KeptDisabled = append(st.report.KeptDisabled, fmt.Sprintf("key %s", id))
	return st.put(path, rec)
}

// stageRings wraps the DEKs of m's keyrings for it.
func (st *restorer) stageRings(ctx context.Context, m dek.MasterID, was map[dek.Version]State) error {
	someOn := false
	for _, state := range was {
		someOn = someOn || state == Enabled
	}
	for _, e := range sorted(&st.l.view.rings, m.Vault+"/") {
		if e.value.rec.MasterKey != m.Key {
			continue
		}
		_, name := cutID(e.key)
		for i, r := range e.value.versions {
			if r.State == Failed || r.State == Destroyed {
				continue
			}
			id := dek.KeyID{KeyringID: dek.KeyringID{Vault: m.Vault, Keyring: name}, Version: dek.Version(i + 1)}
			next := *r
			if err := st.moveDEK(ctx, m, id, &next); err != nil {
				return fmt.Errorf("keyring %s: %w", id, err)
			}
			// Off with its master version, while others were on: nothing else
			// would keep it off under the one new version.
			if next.State == Enabled && was[r.Master] == Disabled && someOn {
				next.State = Disabled
				st.report.KeptDisabled = append(st.report.KeptDisabled, "keyring "+id.String())
			}
			if err := st.put(versionPath(ringPath(m.Vault, name), id.Version), &next); err != nil {
				return err
			}
		}
	}
	return nil
}

// moveDEK opens the recovery copy of one DEK and wraps it for m, proven by the
// token. Keyring version and server version stay.
func (st *restorer) moveDEK(ctx context.Context, m dek.MasterID, id dek.KeyID, rec *ringVersionRecord) error {
	if len(rec.Recovery) == 0 {
		st.report.Lost = append(st.report.Lost, id.String())
		rec.State, rec.Changed = Destroyed, st.s.now()
		return nil
	}
	k, err := st.opt.Private.Open(dekRecoveryBinding(id), rec.Recovery)
	if err != nil {
		return err
	}
	defer k.Destroy()
	w, err := st.s.wrap(ctx, id, m, k)
	if err != nil {
		return err
	}
	rec.Wrapped, rec.Master, rec.Changed = w.Bytes(), m.Version, st.s.now()
	if st.opt.Recipient != "" {
		if rec.Recovery, err = st.s.recoveryCopy(dekRecoveryBinding(id), k); err != nil {
			return err
		}
	}
	if rec.State == Pending {
		rec.State = Enabled // it is whole now
	}
	st.report.Rewrapped++
	return st.s.proveRing(ctx, rec, k)
}

// firstLine names the log of a checkpoint (C2SP tlog-checkpoint: its origin).
func firstLine(checkpoint []byte) string {
	line, _, _ := bytes.Cut(checkpoint, []byte("\n"))
	return string(line)
}

// firstLines is what the record of a restore keeps of a checkpoint: origin,
// size, root.
func firstLines(checkpoint []byte) string {
	lines := strings.SplitN(string(checkpoint), "\n", 4)
	return strings.Join(lines[:min(3, len(lines))], " ")
}

// checkpointChange returns the newest change of state that a checkpoint
// covers: its line "change N ..." (kms/audit/FORMAT.md). 0: none.
func checkpointChange(checkpoint []byte) uint64 {
	for line := range strings.Lines(string(checkpoint)) {
		if rest, ok := strings.CutPrefix(line, "change "); ok {
			n, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
			v, err := strconv.ParseUint(n, 10, 64)
			if err == nil {
				return v
			}
		}
	}
	return 0
}

// fromOldLog decides about a checkpoint that this log does not extend: one
// of a log that a restore ended is no sign of a rollback, unless it covers
// changes of state that the restore did not bring back.
func (v *view) fromOldLog(checkpoint []byte) (known, accepted bool) {
	name, n := firstLine(checkpoint), checkpointChange(checkpoint)
	for _, p := range v.system.Previous {
		if p.Name == name {
			return true, p.Accepted || n <= p.Change
		}
	}
	return false, false
}
