package audit_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
)

// TestPast reads a log that a crash ended: what it says is what the log itself
// would say at its next start, and its files stay as they are.
func TestPast(t *testing.T) {
	dir := newDir(t)
	l := open(t, testConfig(t, dir))
	act(t, l, 20)
	done := event(3, kms.PhaseOutcome)
	done.Intent, done.Result, done.Change, done.State = mustAppend(t, l, event(3, kms.PhaseIntent)), "ok", 7, []byte("state")
	mustAppend(t, l, done)
	last := mustAppend(t, l, event(4, kms.PhaseIntent)) // without an outcome
	closeLog(t, l)
	head, err := l.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seg := glob(t, dir, "*.log")[0]
	write(t, seg, append(bytes.TrimRight(read(t, seg), "\x00"), `{"seq":`...)) // torn
	before := read(t, seg)
	check := audit.Check{Keys: []crypto.PublicKey{testKey().Public()}, Exported: [][]byte{head}}
	p, err := audit.OpenPast(t.Context(), os.DirFS(dir), check)
	if err != nil {
		t.Fatal(err)
	}
	if n, state, err := p.StateTail(t.Context()); n != 7 || string(state) != "state" || err != nil {
		t.Errorf("tail %d %q, %v", n, state, err)
	}
	var got []kms.Event
	err = p.EventsAfter(t.Context(), 6, func(_ uint64, e kms.Event) error { got = append(got, e); return nil })
	if err != nil || len(got) != 2 || got[0].Change != 7 || got[1].Result != kms.ResultUnknown || got[1].Intent != last {
		t.Errorf("events %+v, %v", got, err)
	}
	if !bytes.Equal(before, read(t, seg)) {
		t.Error("reading changed the log")
	}

	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edit(t, dir, 5, func(l [][]byte, i int) [][]byte {
		l[i] = bytes.Replace(l[i], []byte("host/db"), []byte("host/xx"), 1)
		return l
	})
	for _, c := range []struct {
		name, dir string
		key       crypto.PublicKey
		want      error
	}{
		{"changed", dir, testKey().Public(), dek.ErrCorrupt},
		{"another key", dir, other.Public(), dek.ErrAuth},
		{"empty", newDir(t), testKey().Public(), dek.ErrNotFound},
		{"absent", filepath.Join(dir, "absent"), testKey().Public(), dek.ErrNotFound},
	} {
		if _, err := audit.OpenPast(t.Context(), os.DirFS(c.dir), audit.Check{Keys: []crypto.PublicKey{c.key}}); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.want)
		}
	}
}
