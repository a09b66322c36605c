package connector

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/keyward/keyward/dek"
)

const (
	stateVersion  = 1
	maxStateBytes = 256 << 20
	maxNonces     = 64
)

// instanceState is what the agent keeps of an instance, in memory and in its
// state directory. Nothing in it is a secret: wrapped DEKs are safe anywhere.
type instanceState struct {
	Format     int            `json:"keyward_agent_state"`
	Name       string         `json:"name"`
	Opened     bool           `json:"opened"` // the service has let it in at least once
	Generation uint64         `json:"generation"`
	Checkpoint []byte         `json:"checkpoint,omitempty"` // newest audit checkpoint seen
	Contact    time.Time      `json:"contact,omitzero"`     // last answer of the service
	Nonces     [][]byte       `json:"nonces,omitempty"`     // database processes that were let in
	Keyrings   []keyringState `json:"keyrings"`
}

type keyringState struct {
	Vault     string         `json:"vault"`
	Name      string         `json:"name"`
	MasterKey string         `json:"master_key"`
	ServerKey uint32         `json:"server_key"`
	Gone      bool           `json:"gone,omitempty"` // the service no longer names it
	Announced uint32         `json:"announced"`      // server version databases encrypt with
	Versions  []versionState `json:"versions"`       // ascending server versions
}

type versionState struct {
	Version       dek.Version `json:"version"`
	ServerVersion uint32      `json:"server_version"`
	Seen          bool        `json:"seen"` // its key was held once: it may be announced
	Denied        bool        `json:"denied,omitempty"`
	Wrapped       []byte      `json:"wrapped"`

	err error // why it has no key, nil if it does
}

func (k *keyringState) id() dek.KeyringID { return dek.KeyringID{Vault: k.Vault, Keyring: k.Name} }

func (k *keyringState) key(v *versionState) dek.KeyID {
	return dek.KeyID{KeyringID: k.id(), Version: v.Version}
}

// version returns the version that a server knows as n, or nil.
func (k *keyringState) version(n uint32) *versionState {
	for i := range k.Versions {
		if k.Versions[i].ServerVersion == n {
			return &k.Versions[i]
		}
	}
	return nil
}

func (s *instanceState) knows(nonce [nonceSize]byte) bool {
	return slices.ContainsFunc(s.Nonces, func(b []byte) bool { return bytes.Equal(b, nonce[:]) })
}

func (s *instanceState) remember(nonce [nonceSize]byte) {
	if s.knows(nonce) {
		return
	}
	if len(s.Nonces) >= maxNonces {
		s.Nonces = slices.Delete(s.Nonces, 0, len(s.Nonces)-maxNonces+1)
	}
	s.Nonces = append(s.Nonces, slices.Clone(nonce[:]))
}

func statePath(dir, instance string) string {
	return filepath.Join(dir, "instances", instance+".json")
}

// loadState reads an instance's state; an absent file is an empty state. It
// wraps dek.ErrCorrupt for anything that saveState did not write.
func loadState(dir, instance string) (instanceState, error) {
	path := statePath(dir, instance)
	empty := instanceState{Format: stateVersion, Name: instance}
	f, err := os.Open(path) //nolint:gosec // instance is a checked name
	if errors.Is(err, fs.ErrNotExist) {
		return empty, nil
	}
	if err != nil {
		return empty, fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() > maxStateBytes {
		return empty, corruptState(path, "not a regular file of a sane size")
	}
	var s instanceState
	d := json.NewDecoder(bufio.NewReader(f))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return empty, corruptState(path, err.Error())
	}
	if s.Format != stateVersion || s.Name != instance {
		return empty, corruptState(path, "version "+strconv.Itoa(s.Format)+" for instance "+strconv.Quote(s.Name))
	}
	for i := range s.Keyrings {
		for j := range s.Keyrings[i].Versions {
			if _, err := dek.ParseWrapped(s.Keyrings[i].Versions[j].Wrapped); err != nil {
				return empty, corruptState(path, "a wrapped key in it is damaged")
			}
		}
	}
	return s, nil
}

func corruptState(path, why string) error {
	return fmt.Errorf("%w: %s: %s: move the file away and start again; the key service sends its content anew, only the newest audit checkpoint seen is lost", dek.ErrCorrupt, path, why)
}

// saveState writes it durably, a keyring at a time so that ten thousand
// wrapped keys need no second copy in memory.
func saveState(dir string, s *instanceState) error {
	path := statePath(dir, s.Name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return diskError(path, err)
	}
	head := *s
	head.Keyrings = []keyringState{}
	b, err := json.Marshal(head)
	if err != nil {
		return fmt.Errorf("state of %s: %w", s.Name, err)
	}
	b = bytes.TrimSuffix(b, []byte("[]}")) // Keyrings is the last field
	return writeDurably(path, 0o600, func(f *os.File) error {
		w := bufio.NewWriter(f)
		_, _ = w.Write(append(b, '['))
		for i := range s.Keyrings {
			if i > 0 {
				_ = w.WriteByte(',')
			}
			one, err := json.Marshal(&s.Keyrings[i])
			if err != nil {
				return err
			}
			_, _ = w.Write(append([]byte{'\n'}, one...))
		}
		_, _ = w.WriteString("\n]}\n")
		return w.Flush() // bufio keeps the first error
	})
}

// newerCheckpoint reports whether b is a checkpoint of a larger log than a.
// The second line of a checkpoint is the size of the log in decimal digits.
func newerCheckpoint(a, b []byte) bool {
	if len(b) == 0 {
		return false
	}
	if len(a) == 0 {
		return true
	}
	have, ok1 := checkpointSize(a)
	got, ok2 := checkpointSize(b)
	return ok1 && ok2 && got > have
}

func checkpointSize(b []byte) (uint64, bool) {
	lines := bytes.SplitN(b, []byte{'\n'}, 3)
	if len(lines) < 3 {
		return 0, false
	}
	n, err := strconv.ParseUint(string(lines[1]), 10, 64)
	return n, err == nil
}
