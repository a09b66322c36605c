package audit_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/audit"
)

// victim is the record the tables work on; it is no outcome's intent.
const victim = 333

// A tampering is one way to change a log, and where Verify must say it is.
type tampering struct {
	name     string
	change   func(t *testing.T, dir string)
	from, to uint64 // 0: anywhere
	exported bool   // found only with an exported checkpoint
}

func TestTampering(t *testing.T) {
	base, head := written(t, 400)
	last := mustVerify(t, base).Last
	for _, c := range slices.Concat(changes(), moves(), cuts(last)) {
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
			c.judge(t, r, err)
		})
	}
	mustVerify(t, base)
}

// judge checks that the report names the place.
func (c *tampering) judge(t *testing.T, r audit.Report, err error) {
	t.Helper()
	t.Log(err)
	p := r.Problem
	if p == nil {
		if c.from != 0 || c.to != 0 {
			t.Fatal("no problem in the report")
		}
		return
	}
	if c.from != 0 && p.Seq != c.from || c.to != 0 && p.Last != c.to && (c.from != 0 || p.Seq > c.to || p.Last < c.to) {
		t.Errorf("named records %d to %d, want %d to %d", p.Seq, p.Last, c.from, c.to)
	}
}

// changes are records with other content.
func changes() []tampering {
	return []tampering{
		{"changed", func(t *testing.T, dir string) {
			edit(t, dir, victim, func(l [][]byte, i int) [][]byte {
				l[i] = bytes.Replace(l[i], []byte("host/db1"), []byte("host/db2"), 1)
				return l
			})
		}, victim, victim, false},
		{"one bit of a quote", func(t *testing.T, dir string) {
			edit(t, dir, victim, func(l [][]byte, i int) [][]byte { l[i][10] ^= 1; return l })
		}, victim, victim, false},
		{"changed in two places", func(t *testing.T, dir string) {
			for _, s := range []uint64{victim + 100, victim} {
				edit(t, dir, s, func(l [][]byte, i int) [][]byte {
					l[i] = bytes.Replace(l[i], []byte("payroll"), []byte("petrols"), 1)
					return l
				})
			}
		}, victim, victim, false},
		{"changed, stored hash too", func(t *testing.T, dir string) {
			edit(t, dir, victim, func(l [][]byte, i int) [][]byte {
				l[i] = bytes.Replace(l[i], []byte("host/db1"), []byte("host/db2"), 1)
				tree := filepath.Join(dir, "tree")
				b := read(t, tree)
				h := tlog.RecordHash(bytes.TrimSuffix(l[i], []byte("\n")))
				copy(b[tlog.StoredHashIndex(0, victim-1)*tlog.HashSize:], h[:])
				write(t, tree, b)
				return l
			})
		}, 0, victim, false},
		{"changed, no stored hashes", func(t *testing.T, dir string) {
			remove(t, filepath.Join(dir, "tree"))
			edit(t, dir, victim, func(l [][]byte, i int) [][]byte {
				l[i] = bytes.Replace(l[i], []byte("host/db1"), []byte("host/db2"), 1)
				return l
			})
		}, 0, victim, false},
	}
}

// moves are records that are missing, too many or elsewhere.
func moves() []tampering {
	return []tampering{
		{"removed", func(t *testing.T, dir string) {
			edit(t, dir, victim, func(l [][]byte, i int) [][]byte { return slices.Delete(l, i, i+1) })
		}, victim, victim, false},
		{"removed, the rest renumbered", func(t *testing.T, dir string) {
			edit(t, dir, victim, func(l [][]byte, i int) [][]byte {
				return append(l[:i:i], renumber(l[i+1:], victim)...)
			})
		}, victim, victim, false},
		{"inserted", func(t *testing.T, dir string) {
			edit(t, dir, victim, func(l [][]byte, i int) [][]byte { return slices.Insert(l, i, l[i]) })
		}, victim + 1, victim + 1, false},
		{"inserted, the rest renumbered", func(t *testing.T, dir string) {
			edit(t, dir, victim, func(l [][]byte, i int) [][]byte {
				return append(l[:i:i], renumber(slices.Insert(slices.Clone(l[i:]), 0, l[i-2]), victim)...)
			})
		}, victim, victim, false},
		{"swapped", func(t *testing.T, dir string) {
			edit(t, dir, victim, func(l [][]byte, i int) [][]byte { l[i], l[i+1] = l[i+1], l[i]; return l })
		}, victim, victim, false},
		{"swapped and renumbered", func(t *testing.T, dir string) {
			edit(t, dir, victim, func(l [][]byte, i int) [][]byte {
				return append(l[:i:i], append(renumber([][]byte{l[i+1], l[i]}, victim), l[i+2:]...)...)
			})
		}, victim, victim, false},
	}
}

// cuts are whole files and ends that are gone or do not belong.
func cuts(last uint64) []tampering {
	return []tampering{
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
	}
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
