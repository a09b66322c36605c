package audit_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
)

// written makes a closed log of several segments and returns its head.
func written(t testing.TB, pairs int) (dir string, head []byte) {
	t.Helper()
	dir = newDir(t)
	l := open(t, testConfig(t, dir))
	act(t, l, pairs)
	closeLog(t, l)
	head, err := l.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return dir, head
}

func copyDir(t testing.TB, from string) string {
	t.Helper()
	to := newDir(t)
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(to, 0o700); err != nil {
		t.Fatal(err)
	}
	return to
}

func glob(t testing.TB, dir, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t testing.TB, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func remove(t testing.TB, names ...string) {
	t.Helper()
	for _, n := range names {
		if err := os.Remove(n); err != nil {
			t.Fatal(err)
		}
	}
}

// edit lets f change the records of the segment that holds seq; i is the place
// of seq in it.
func edit(t *testing.T, dir string, seq uint64, f func(lines [][]byte, i int) [][]byte) {
	t.Helper()
	segs := glob(t, dir, "*.log")
	for n := len(segs) - 1; n >= 0; n-- {
		var first uint64
		if _, err := fmt.Sscanf(filepath.Base(segs[n]), "%d.log", &first); err != nil {
			t.Fatal(err)
		}
		if first > seq {
			continue
		}
		lines := bytes.SplitAfter(read(t, segs[n]), []byte("\n"))
		write(t, segs[n], bytes.Join(f(lines[:len(lines)-1], int(seq-first)), nil))
		return
	}
}

// renumber gives the records of lines consecutive sequences from first on.
func renumber(lines [][]byte, first uint64) [][]byte {
	out := make([][]byte, len(lines))
	for i, line := range lines {
		_, rest, _ := bytes.Cut(line, []byte(","))
		out[i] = fmt.Appendf(nil, `{"seq":%d,%s`, first+uint64(i), rest)
	}
	return out
}

func TestTampering(t *testing.T) {
	base, head := written(t, 400)
	const n = 333 // the record the table works on; it is no outcome's intent
	last := mustVerify(t, base).Last
	for _, c := range []struct {
		name     string
		change   func(t *testing.T, dir string)
		from, to uint64 // where the problem must be said to be
		exported bool
	}{
		{"changed", func(t *testing.T, dir string) {
			edit(t, dir, n, func(l [][]byte, i int) [][]byte {
				l[i] = bytes.Replace(l[i], []byte("host/db1"), []byte("host/db2"), 1)
				return l
			})
		}, n, n, false},
		{"one bit of a quote", func(t *testing.T, dir string) {
			edit(t, dir, n, func(l [][]byte, i int) [][]byte { l[i][10] ^= 1; return l })
		}, n, n, false},
		{"changed in two places", func(t *testing.T, dir string) {
			for _, s := range []uint64{n + 100, n} {
				edit(t, dir, s, func(l [][]byte, i int) [][]byte {
					l[i] = bytes.Replace(l[i], []byte("payroll"), []byte("petrols"), 1)
					return l
				})
			}
		}, n, n, false},
		{"changed, stored hash too", func(t *testing.T, dir string) {
			edit(t, dir, n, func(l [][]byte, i int) [][]byte {
				l[i] = bytes.Replace(l[i], []byte("host/db1"), []byte("host/db2"), 1)
				tree := filepath.Join(dir, "tree")
				b := read(t, tree)
				h := tlog.RecordHash(bytes.TrimSuffix(l[i], []byte("\n")))
				copy(b[tlog.StoredHashIndex(0, n-1)*tlog.HashSize:], h[:])
				write(t, tree, b)
				return l
			})
		}, 0, n, false},
		{"changed, no stored hashes", func(t *testing.T, dir string) {
			remove(t, filepath.Join(dir, "tree"))
			edit(t, dir, n, func(l [][]byte, i int) [][]byte {
				l[i] = bytes.Replace(l[i], []byte("host/db1"), []byte("host/db2"), 1)
				return l
			})
		}, 0, n, false},
		{"removed", func(t *testing.T, dir string) {
			edit(t, dir, n, func(l [][]byte, i int) [][]byte { return slices.Delete(l, i, i+1) })
		}, n, n, false},
		{"removed, the rest renumbered", func(t *testing.T, dir string) {
			edit(t, dir, n, func(l [][]byte, i int) [][]byte {
				return append(l[:i:i], renumber(l[i+1:], n)...)
			})
		}, n, n, false},
		{"inserted", func(t *testing.T, dir string) {
			edit(t, dir, n, func(l [][]byte, i int) [][]byte { return slices.Insert(l, i, l[i]) })
		}, n + 1, n + 1, false},
		{"inserted, the rest renumbered", func(t *testing.T, dir string) {
			edit(t, dir, n, func(l [][]byte, i int) [][]byte {
				return append(l[:i:i], renumber(slices.Insert(slices.Clone(l[i:]), 0, l[i-2]), n)...)
			})
		}, n, n, false},
		{"swapped", func(t *testing.T, dir string) {
			edit(t, dir, n, func(l [][]byte, i int) [][]byte { l[i], l[i+1] = l[i+1], l[i]; return l })
		}, n, n, false},
		{"swapped and renumbered", func(t *testing.T, dir string) {
			edit(t, dir, n, func(l [][]byte, i int) [][]byte {
				return append(l[:i:i], append(renumber([][]byte{l[i+1], l[i]}, n), l[i+2:]...)...)
			})
		}, n, n, false},
		{"cut at the end", func(t *testing.T, dir string) {
			edit(t, dir, last-4, func(l [][]byte, i int) [][]byte { return l[:i] })
		}, last - 4, last, false},
		{"cut at the end within a record", func(t *testing.T, dir string) {
			edit(t, dir, last, func(l [][]byte, i int) [][]byte { l[i] = l[i][:50]; return l })
		}, last, last, false},
		{"first segment removed", func(t *testing.T, dir string) {
			remove(t, glob(t, dir, "*.log")[0])
		}, 1, 0, false},
		{"middle segment removed", func(t *testing.T, dir string) {
			remove(t, glob(t, dir, "*.log")[1])
		}, 0, 0, false},
		{"last segment removed", func(t *testing.T, dir string) {
			segs := glob(t, dir, "*.log")
			remove(t, segs[len(segs)-1])
		}, 0, last, false},
		{"all segments removed", func(t *testing.T, dir string) {
			remove(t, glob(t, dir, "*.log")...)
		}, 1, last, false},
		{"checkpoints removed", func(t *testing.T, dir string) {
			remove(t, glob(t, dir, "*.checkpoints")...)
		}, 1, 0, false},
		{"cut with its checkpoints, one exported", func(t *testing.T, dir string) {
			segs, cps := glob(t, dir, "*.log"), glob(t, dir, "*.checkpoints")
			remove(t, segs[len(segs)-1], cps[len(cps)-1])
		}, 0, last, true},
		{"bad line at the end", func(t *testing.T, dir string) {
			segs := glob(t, dir, "*.log")
			name := segs[len(segs)-1]
			write(t, name, append(read(t, name), []byte("{\"seq\":9}\n{\"seq\":10}\n")...))
		}, last + 1, last + 1, false},
		{"size in a checkpoint", func(t *testing.T, dir string) {
			cps := glob(t, dir, "*.checkpoints")
			name := cps[len(cps)-1]
			write(t, name, bytes.Replace(read(t, name), fmt.Appendf(nil, "\n%d\n", last), fmt.Appendf(nil, "\n%d\n", last-1), 1))
		}, 0, 0, false},
		{"newest checkpoint signed by another", func(t *testing.T, dir string) {
			resign(t, dir)
		}, 0, 0, false},
		{"a file that does not belong", func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "7.log"), nil)
		}, 0, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := copyDir(t, base)
			c.change(t, dir)
			var exported [][]byte
			if c.exported {
				if _, err := verify(t, dir); err != nil {
					t.Errorf("without the exported checkpoint: %v", err)
				}
				exported = append(exported, head)
			}
			r, err := verify(t, dir, exported...)
			if !errors.Is(err, dek.ErrCorrupt) {
				t.Fatalf("got %v, want ErrCorrupt", err)
			}
			p := r.Problem
			t.Log(err)
			if p == nil {
				if c.from == 0 && c.to == 0 {
					return
				}
				t.Fatal("no problem in the report")
			}
			if c.from != 0 && p.Seq != c.from || c.to != 0 && p.Last != c.to && (c.from != 0 || p.Seq > c.to || p.Last < c.to) {
				t.Errorf("named records %d to %d, want %d to %d", p.Seq, p.Last, c.from, c.to)
			}
		})
	}
	mustVerify(t, base)
}

// resign replaces the signature of the newest checkpoint by another key's.
func resign(t *testing.T, dir string) {
	t.Helper()
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cps := glob(t, dir, "*.checkpoints")
	name := cps[len(cps)-1]
	notes, _ := audit.SplitNotes(read(t, name))
	c, err := audit.ParseCheckpoint(notes[len(notes)-1], testKey().Public())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Sign(audit.Config{Signer: other}); err != nil {
		t.Fatal(err)
	}
	notes[len(notes)-1] = c.Text
	write(t, name, bytes.Join(notes, nil))
}

// TestRandomFlips changes one random byte of one random record, many times: the
// record must be named.
func TestRandomFlips(t *testing.T) {
	base, _ := written(t, 150)
	rng := mrand.New(mrand.NewPCG(3, 4))
	last := mustVerify(t, base).Last
	dir := copyDir(t, base)
	for range 300 {
		seq := 2 + rng.Uint64N(last-1)
		var was byte
		var at int
		change := func(b func(byte) byte) {
			edit(t, dir, seq, func(l [][]byte, i int) [][]byte {
				if at == 0 {
					at = 1 + rng.IntN(len(l[i])-2)
				}
				was, l[i][at] = l[i][at], b(l[i][at])
				return l
			})
		}
		change(func(b byte) byte {
			if x := b ^ byte(1<<rng.IntN(7)); x != '\n' {
				return x
			}
			return b ^ 1
		})
		good := was
		r, err := verify(t, dir)
		if r.Problem == nil || r.Problem.Seq != seq {
			t.Fatalf("record %d, byte %d: got %v", seq, at, err)
		}
		change(func(byte) byte { return good })
	}
	mustVerify(t, dir)
}

// TestOpenTampered shows that a log which does not fit its checkpoint is not
// continued.
func TestOpenTampered(t *testing.T) {
	base, _ := written(t, 300)
	for _, c := range []struct {
		name   string
		change func(t *testing.T, dir string)
		want   error
	}{
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
	} {
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
