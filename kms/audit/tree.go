package audit

import (
	"fmt"
	"math/bits"
	"os"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyward/keyward/dek"
)

// A frontier is the right edge of a Merkle tree: enough to add records and to
// compute the root. at[i] is the root of the last whole subtree of 2^i records
// and counts if bit i of n is set.
type frontier struct {
	n  uint64 // records
	at [64]tlog.Hash
}

// add takes the hash of the next record and appends the hashes it completes,
// in the order of tlog.StoredHashIndex, to out.
func (f *frontier) add(h tlog.Hash, out []tlog.Hash) []tlog.Hash {
	out = append(out, h)
	i := 0
	for ; f.n>>i&1 == 1; i++ {
		h = tlog.NodeHash(f.at[i], h)
		out = append(out, h)
	}
	f.at[i] = h
	f.n++
	return out
}

// root computes the tree head (RFC 6962 section 2.1).
func (f *frontier) root() tlog.Hash {
	if f.n == 0 {
		h, _ := tlog.TreeHash(0, nil) // the hash of nothing; reads nothing
		return h
	}
	i := bits.TrailingZeros64(f.n)
	h := f.at[i]
	for i++; i < 64; i++ {
		if f.n>>i&1 == 1 {
			h = tlog.NodeHash(f.at[i], h)
		}
	}
	return h
}

// readFrontier rebuilds the edge of a tree of n records from stored hashes.
func readFrontier(n uint64, r tlog.HashReader) (*frontier, error) {
	f := &frontier{n: n}
	var indexes []int64
	var levels []int
	for i := 63; i >= 0; i-- {
		if n>>i&1 == 1 { // the subtree that ends at the bits above and including i
			indexes = append(indexes, tlog.StoredHashIndex(i, int64(n>>i)-1))
			levels = append(levels, i)
		}
	}
	hashes, err := r.ReadHashes(indexes)
	if err != nil {
		return nil, err
	}
	for i, l := range levels {
		f.at[l] = hashes[i]
	}
	return f, nil
}

// A treeFile is the file of stored hashes, 32 bytes each at 32 times
// tlog.StoredHashIndex. It can be computed from the records; it is kept so
// that opening and proving need not read them.
type treeFile struct{ f *os.File }

func (t treeFile) offset(n uint64) int64 {
	return tlog.StoredHashCount(int64(n)) * tlog.HashSize
}

// ReadHashes implements tlog.HashReader.
func (t treeFile) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		if _, err := t.f.ReadAt(out[i][:], x*tlog.HashSize); err != nil {
			return nil, fmt.Errorf("%w: audit: read stored hash %d: %w", dek.ErrCorrupt, x, err)
		}
	}
	return out, nil
}

// pack joins hashes for writing.
func pack(b []byte, hashes []tlog.Hash) []byte {
	for i := range hashes {
		b = append(b, hashes[i][:]...)
	}
	return b
}
