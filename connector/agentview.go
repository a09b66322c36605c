package connector

import (
	"bytes"
	"slices"

	"github.com/keyward/keyward/dek"
)

// A view is what sessions see of an instance: immutable, replaced whole.
type view struct {
	generation uint64
	list       []byte // encoded LIST body without generation
	index      map[ServerKey]slot
	changed    chan struct{} // closed when a newer view took its place
}

// A slot is one version as a session serves it.
type slot struct {
	id      dek.KeyID
	denied  bool
	until   int64 // Unix nanoseconds: a denied version is served from memory until then
	expired bool  // the outage limit has passed
}

// maxListed bounds a LIST reply so that it fits a frame.
const maxListed = maxFrame - 256

// buildView encodes the state; in.mu is held.
func (in *instance) buildView() *view {
	v := &view{index: make(map[ServerKey]slot, in.versions()), changed: make(chan struct{})}
	var listed []ListedKeyring
	for i := range in.state.Keyrings {
		k := &in.state.Keyrings[i]
		if k.ServerKey == 0 || k.Announced == 0 {
			continue // not for a database server, or not one key was ever held
		}
		entry := ListedKeyring{ID: k.ServerKey, Latest: k.Announced, State: in.listState(k), Keyring: k.id().String()}
		for j := range k.Versions {
			ver := &k.Versions[j]
			if !ver.Seen && !ver.Denied {
				continue
			}
			entry.Versions = append(entry.Versions, ver.ServerVersion)
			v.index[ServerKey{k.ServerKey, ver.ServerVersion}] = in.slot(k, ver)
		}
		listed = append(listed, entry)
	}
	slices.SortFunc(listed, func(a, b ListedKeyring) int { return int(int64(a.ID) - int64(b.ID)) })
	v.list = appendListBody(nil, listed)
	if len(v.list) > maxListed {
		in.log.Error("the instance has more versions than one reply can list; the rest is served but not listed", "instance", in.name, "bytes", len(v.list))
		for len(v.list) > maxListed {
			listed = trimListing(listed)
			v.list = appendListBody(nil, listed)
		}
	}
	return v
}

// trimListing drops the oldest half of the longest version list.
func trimListing(listed []ListedKeyring) []ListedKeyring {
	longest := 0
	for i := range listed {
		if len(listed[i].Versions) > len(listed[longest].Versions) {
			longest = i
		}
	}
	n := len(listed[longest].Versions)
	if n < 2 {
		return listed[:len(listed)/2]
	}
	listed[longest].Versions = listed[longest].Versions[(n+1)/2:]
	return listed
}

func (in *instance) listState(k *keyringState) ListState {
	if v := k.version(k.Announced); v != nil && v.Denied {
		return ListDenied
	}
	if in.stale {
		return ListStale
	}
	return ListActive
}

// versions counts, to size the index at once; in.mu is held.
func (in *instance) versions() (n int) {
	in.each(func(*keyringState, *versionState) { n++ })
	return n
}

func (in *instance) slot(k *keyringState, v *versionState) slot {
	s := slot{id: k.key(v), denied: v.Denied, expired: in.expired}
	if v.Denied {
		s.until = in.deniedAt.Add(in.cfg.DenialGrace).UnixNano()
	}
	return s
}

// publish replaces the view. The generation moves only if what LIST shows does.
// in.mu is held.
func (in *instance) publish() {
	next, old := in.buildView(), in.view.Load()
	next.generation = old.generation
	if !bytes.Equal(next.list, old.list) {
		next.generation++
	} else {
		// Nobody has to look again; those who wait go on waiting.
		next.changed = old.changed
	}
	in.view.Store(next)
	if next.changed != old.changed {
		close(old.changed)
	}
}
