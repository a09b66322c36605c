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
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
)

// openCases are changes to a log and what opening it must say.
func openCases() []openCase {
	return []openCase{
		{"cut", func(t *testing.T, dir string) {
			edit(t, dir, 600, func(l [][]byte, i int) [][]byte { return l[:i] })
		}, dek.ErrCorrupt},
		{"newest segment removed", func(t *testing.T, dir string) {
			segs := glob(t, dir, "*.log")
			remove(t, segs[len(segs)-1])
		}, dek.ErrCorrupt},
		{"all removed", func(t *testing.T, dir string) { remove(t, glob(t, dir, "*.log")...) }, dek.ErrCorrupt},
		{"checkpoints removed", func(t *testing.T, dir string) { remove(t, glob(t, dir, "*.checkpoints")...) }, dek.ErrCorrupt},
		{"signed by another", resign, dek.ErrCorrupt},
		{"first record replaced", func(t *testing.T, dir string) {
			edit(t, dir, 1, func(l [][]byte, i int) [][]byte {
				l[i] = bytes.Replace(l[i], []byte("log "), []byte("loG "), 1)
				return l
			})
		}, dek.ErrCorrupt},
		{"stored hashes removed", func(t *testing.T, dir string) { remove(t, filepath.Join(dir, "tree")) }, nil},
		{"stored hashes damaged", func(t *testing.T, dir string) {
			b := read(t, filepath.Join(dir, "tree"))
			for i := range b {
				b[i] ^= 0x55
			}
			write(t, filepath.Join(dir, "tree"), b)
		}, nil},
		{"stored hashes removed and a record changed", func(t *testing.T, dir string) {
			remove(t, filepath.Join(dir, "tree"))
			edit(t, dir, 3, func(l [][]byte, i int) [][]byte {
				l[i] = bytes.Replace(l[i], []byte("host/db1"), []byte("host/db2"), 1)
				return l
			})
		}, dek.ErrCorrupt},
	}
}

type openCase struct {
	name   string
	change func(t *testing.T, dir string)
	want   error
}

// TestOpenTampered shows that a log which does not fit its checkpoint is not
// continued.
func TestOpenTampered(t *testing.T) {
	base, _ := written(t, 300)
	for _, c := range openCases() {
		t.Run(c.name, func(t *testing.T) {
			dir := copyDir(t, base)
			c.change(t, dir)
			l, err := audit.Open(t.Context(), testConfig(t, dir))
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if err != nil {
				if !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "The way on") {
					t.Errorf("the text names no way on: %v", err)
				}
				return
			}
			if !l.Recovery().Rebuilt {
				t.Error("the stored hashes were not rebuilt")
			}
			act(t, l, 3)
			closeLog(t, l)
			mustVerify(t, dir)
		})
	}
}

func TestExtends(t *testing.T) {
	dir := newDir(t)
	l := open(t, testConfig(t, dir))
	var heads [][]byte
	for range 5 {
		h, err := l.Head(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		heads = append(heads, h)
		act(t, l, 20)
		for l.Newest().Size != l.Size() {
			if err := t.Context().Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i, h := range heads {
		if err := l.Extends(t.Context(), h); err != nil {
			t.Errorf("head %d: %v", i, err)
		}
	}
	old := copyDir(t, dir)
	act(t, l, 20)
	closeLog(t, l)
	newest, err := l.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}

	back := open(t, testConfig(t, old)) // put back in time
	if err := back.Extends(t.Context(), newest); !errors.Is(err, dek.ErrCorrupt) {
		t.Errorf("log put back: got %v, want ErrCorrupt", err)
	}
	mustAppend(t, back, event(99, kms.PhaseRefused))
	act(t, back, 30) // and grown again, differently
	if err := back.Extends(t.Context(), newest); !errors.Is(err, dek.ErrCorrupt) {
		t.Errorf("forked log: got %v, want ErrCorrupt", err)
	}
	if err := back.Extends(t.Context(), heads[4]); err != nil {
		t.Errorf("common past: %v", err)
	}
	closeLog(t, back)
	other := open(t, testConfig(t, newDir(t)))
	defer closeLog(t, other)
	if err := other.Extends(t.Context(), newest); !errors.Is(err, dek.ErrCorrupt) {
		t.Errorf("another log: got %v, want ErrCorrupt", err)
	}
	newest[20] ^= 1
	if err := other.Extends(t.Context(), newest); !errors.Is(err, dek.ErrAuth) {
		t.Errorf("damaged checkpoint: got %v, want ErrAuth", err)
	}
}

// TestLink begins a new log after the old one and its key were lost.
func TestLink(t *testing.T) {
	_, head := written(t, 50)
	fresh, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	dir := newDir(t)
	cfg := testConfig(t, dir)
	cfg.Signer = fresh
	cfg.Link = &audit.Link{Checkpoint: head, Key: testKey().Public()}
	l := open(t, cfg)
	act(t, l, 10)
	closeLog(t, l)
	cfg.Link = nil
	l = open(t, cfg)
	if err := l.Extends(t.Context(), head); err != nil {
		t.Errorf("the linked log's head: %v", err)
	}
	closeLog(t, l)
	r, err := audit.Verify(t.Context(), os.DirFS(dir), audit.Check{Keys: []crypto.PublicKey{fresh.Public(), testKey().Public()}})
	if err != nil || r.Previous == nil || r.Previous.Size != 101 || !r.PreviousOK {
		t.Errorf("got %+v (%v), want the old log's 101 records, trusted", r.Previous, err)
	}
	r, err = audit.Verify(t.Context(), os.DirFS(dir), audit.Check{Keys: []crypto.PublicKey{fresh.Public()}})
	if err != nil || r.Previous == nil || r.PreviousOK {
		t.Errorf("without the old key: got %v and trusted %v", err, r.PreviousOK)
	}
	cfg.Dir, cfg.Link = newDir(t), &audit.Link{Checkpoint: head, Key: fresh.Public()}
	if _, err := audit.Open(t.Context(), cfg); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("link signed by another key: got %v, want ErrInvalid", err)
	}
}

func TestProofs(t *testing.T) {
	l := open(t, testConfig(t, newDir(t)))
	defer closeLog(t, l)
	act(t, l, 100)
	var old audit.Checkpoint
	for old = l.Newest(); old.Size < 2; old = l.Newest() {
	}
	act(t, l, 37)
	var c audit.Checkpoint
	for c = l.Newest(); c.Size != l.Size(); c = l.Newest() {
	}
	var some audit.Proof
	for rec, err := range l.Records(t.Context(), audit.Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		p, err := l.ProveInclusion(t.Context(), c, rec.Seq)
		if err != nil {
			t.Fatal(err)
		}
		if err := audit.CheckInclusion(p, c, rec.Seq, rec.Bytes); err != nil {
			t.Errorf("record %d: %v", rec.Seq, err)
		}
		for name, err := range map[string]error{
			"other record":   audit.CheckInclusion(p, c, rec.Seq, append(rec.Bytes, ' ')),
			"other sequence": audit.CheckInclusion(p, c, rec.Seq%c.Size+1, rec.Bytes),
			"zero":           audit.CheckInclusion(p, c, 0, rec.Bytes),
		} {
			if !errors.Is(err, dek.ErrAuth) {
				t.Errorf("record %d, %s: got %v, want ErrAuth", rec.Seq, name, err)
			}
		}
		some = p
	}
	p, err := l.ProveConsistency(t.Context(), c, old)
	if err != nil || audit.CheckConsistency(p, c, old) != nil {
		t.Errorf("%d does not extend %d: %v", c.Size, old.Size, err)
	}
	forged := old
	forged.Root[3] ^= 1
	if err := audit.CheckConsistency(p, c, forged); !errors.Is(err, dek.ErrAuth) {
		t.Errorf("forged root: got %v, want ErrAuth", err)
	}
	if err := audit.CheckConsistency(some, c, old); !errors.Is(err, dek.ErrAuth) {
		t.Errorf("wrong proof: got %v, want ErrAuth", err)
	}
	if _, err := l.ProveInclusion(t.Context(), c, c.Size+1); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("beyond the checkpoint: got %v, want ErrInvalid", err)
	}
}

func TestRemove(t *testing.T) {
	dir := newDir(t)
	l := open(t, testConfig(t, dir))
	act(t, l, 300)
	var exported audit.Checkpoint
	for exported = l.Newest(); exported.Size != l.Size(); exported = l.Newest() {
	}
	act(t, l, 150)
	whole := copyDir(t, dir)
	through, err := l.Remove(t.Context(), exported.Text)
	if err != nil || through == 0 || through > exported.Size {
		t.Fatalf("removed through %d (%v), the export covers %d", through, err, exported.Size)
	}
	if again, err := l.Remove(t.Context(), exported.Text); again != 0 || err != nil {
		t.Errorf("again: removed through %d (%v)", again, err)
	}
	var c audit.Checkpoint
	for c = l.Newest(); c.Size != l.Size(); c = l.Newest() {
	}
	p, err := l.ProveConsistency(t.Context(), c, exported)
	if err != nil || audit.CheckConsistency(p, c, exported) != nil {
		t.Errorf("no proof over what was removed: %v", err)
	}
	intent := mustAppend(t, l, event(1, kms.PhaseIntent))
	closeLog(t, l)
	r := mustVerify(t, dir)
	if r.First != through+1 || r.Last != intent {
		t.Errorf("verified %d to %d, want %d to %d", r.First, r.Last, through+1, intent)
	}
	l = open(t, testConfig(t, dir))
	act(t, l, 10)
	closeLog(t, l)
	mustVerify(t, dir)

	remove(t, glob(t, whole, "*.log")[0]) // the same without a record of it
	if r, err := verify(t, whole); r.Problem == nil || r.Problem.Seq != 1 {
		t.Errorf("segment lost: got %v", err)
	}
	remove(t, filepath.Join(dir, "tree"))
	if r, err := verify(t, dir); r.Problem == nil || r.Problem.Seq != 1 {
		t.Errorf("removed, and the hashes are gone: got %v", err)
	}
}
