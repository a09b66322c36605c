package etcdstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// The database is a bbolt file (go.etcd.io/bbolt, format version 2). bbolt
// trusts its pages and walks them in goroutines of its own, where a damaged
// one ends the process; so the structure is checked here first, with every
// offset bounded. Contents of values are not looked at: they are sealed.
const (
	boltMagic      = 0xED0CDAED
	boltVersion    = 2
	boltPageHeader = 16 // id u64, flags u16, count u16, overflow u32
	boltElement    = 16 // both kinds
	boltBucketHead = 16 // root u64, sequence u64
	flagBranch     = 0x01
	flagLeaf       = 0x02
	leafBucket     = 0x01
	maxDepth       = 64

	minHole = 16 // zero bytes at the end of a record that was never whole
)

type boltFile struct {
	b    []byte
	page int
	high uint64 // pages at or above this are not in use
	seen []bool
	name string // of the bucket being walked
}

// checkDatabase reports damage in the structure of the bbolt file at path; a
// file that is not there is sound.
func checkDatabase(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() == 0 {
		return nil // made and not yet written: etcd starts from the log
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return fmt.Errorf("map %s: %w", path, err)
	}
	defer unix.Munmap(b)
	if err := checkBolt(b); err != nil {
		return fmt.Errorf("database %s: %w", path, err)
	}
	return nil
}

func checkBolt(b []byte) error {
	f := &boltFile{b: b}
	root, err := f.meta()
	if err != nil {
		return err
	}
	f.seen = make([]bool, f.high)
	return f.tree(root, nil, nil, 0)
}

// meta finds the newest sound meta page, as bbolt does, and returns the page
// of the root bucket.
func (f *boltFile) meta() (root uint64, err error) {
	le := binary.LittleEndian
	var best uint64
	for i := range 2 {
		for _, size := range []int{os.Getpagesize(), 4096} {
			off := i*size + boltPageHeader
			if len(f.b) < off+64 {
				continue
			}
			m := f.b[off : off+64]
			h := fnv.New64a()
			h.Write(m[:56])
			ps := int(le.Uint32(m[8:]))
			if le.Uint32(m) != boltMagic || le.Uint32(m[4:]) != boltVersion || le.Uint64(m[56:]) != h.Sum64() || ps != size {
				continue
			}
			if tx := le.Uint64(m[48:]); f.page == 0 || tx > best {
				best, f.page, root, f.high = tx, ps, le.Uint64(m[16:]), le.Uint64(m[40:])
			}
		}
	}
	switch {
	case f.page == 0:
		return 0, errors.New("no sound meta page")
	case f.high > uint64(len(f.b)/f.page):
		return 0, fmt.Errorf("file has %d pages, its meta page says %d", len(f.b)/f.page, f.high)
	}
	return root, nil
}

// tree checks the pages below id; keys must be at least low and, if high is
// not nil, below it.
func (f *boltFile) tree(id uint64, low, high []byte, depth int) error {
	le := binary.LittleEndian
	if id < 2 || id >= f.high || depth > maxDepth {
		return fmt.Errorf("page %d is out of bounds", id)
	}
	off := int(id) * f.page
	over := uint64(le.Uint32(f.b[off+12:]))
	if le.Uint64(f.b[off:]) != id || over >= f.high-id {
		return fmt.Errorf("page %d names another page or runs over the end", id)
	}
	for i := id; i <= id+over; i++ {
		if f.seen[i] {
			return fmt.Errorf("page %d is used twice", i)
		}
		f.seen[i] = true
	}
	p := f.b[off : off+(int(over)+1)*f.page]
	switch flags := le.Uint16(p[8:]); flags {
	case flagBranch:
		return f.branch(id, p, low, high, depth)
	case flagLeaf:
		if err := f.leaf(p, low, high, depth); err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
		return nil
	default:
		return fmt.Errorf("page %d has flags %#x", id, flags)
	}
}

func (f *boltFile) branch(id uint64, p, low, high []byte, depth int) error {
	le := binary.LittleEndian
	n := int(le.Uint16(p[10:]))
	if n == 0 || boltPageHeader+n*boltElement > len(p) {
		return fmt.Errorf("branch page %d has %d entries", id, n)
	}
	keys := make([][]byte, n+1)
	for i := range n {
		e := p[boltPageHeader+i*boltElement:]
		k, err := slot(p, i, uint64(le.Uint32(e)), uint64(le.Uint32(e[4:])))
		if err != nil {
			return fmt.Errorf("branch page %d: %w", id, err)
		}
		keys[i] = k
	}
	keys[n] = high
	for i := range n {
		if err := ordered(keys[i], low, high, i == 0); err != nil {
			return fmt.Errorf("branch page %d: %w", id, err)
		}
		low = keys[i]
		child := le.Uint64(p[boltPageHeader+i*boltElement+8:])
		if err := f.tree(child, keys[i], keys[i+1], depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (f *boltFile) leaf(p, low, high []byte, depth int) error {
	le := binary.LittleEndian
	n := int(le.Uint16(p[10:]))
	if boltPageHeader+n*boltElement > len(p) {
		return fmt.Errorf("leaf has %d entries", n)
	}
	for i := range n {
		e := p[boltPageHeader+i*boltElement:]
		pos, ks, vs := uint64(le.Uint32(e[4:])), uint64(le.Uint32(e[8:])), uint64(le.Uint32(e[12:]))
		kv, err := slot(p, i, pos, ks+vs)
		if err != nil {
			return err
		}
		if ks == 0 {
			return errors.New("empty key")
		}
		if err := ordered(kv[:ks], low, high, i == 0); err != nil {
			return err
		}
		low = kv[:ks]
		switch le.Uint32(e) {
		case 0:
			if err := f.entry(kv[:ks], kv[ks:]); err != nil {
				return err
			}
		case leafBucket:
			if err := f.bucket(string(kv[:ks]), kv[ks:], depth); err != nil {
				return err
			}
		default:
			return errors.New("unknown kind of entry")
		}
	}
	return nil
}

// entry checks what etcd itself takes for granted in goroutines that nothing
// can catch: the keys of its history are revisions (server/storage/mvcc:
// 8 bytes, '_', 8 bytes, and 't' for a deletion) and each value holds a record.
func (f *boltFile) entry(k, v []byte) error {
	if f.name != "key" {
		return nil
	}
	if n := len(k); n != 17 && n != 18 || k[8] != '_' || n == 18 && k[17] != 't' {
		return errors.New("a revision is damaged")
	}
	var kv mvccpb.KeyValue
	if err := proto.Unmarshal(v, &kv); err != nil {
		return errors.New("a record of the history is damaged")
	}
	return nil
}

func (f *boltFile) bucket(name string, v []byte, depth int) error {
	if len(v) < boltBucketHead {
		return errors.New("short bucket")
	}
	outer := f.name
	f.name = name
	defer func() { f.name = outer }()
	if root := binary.LittleEndian.Uint64(v); root != 0 {
		return f.tree(root, nil, nil, depth+1)
	}
	p := v[boltBucketHead:] // the bucket's only page stands inline
	if len(p) < boltPageHeader || binary.LittleEndian.Uint16(p[8:]) != flagLeaf {
		return errors.New("inline bucket is not a leaf")
	}
	return f.leaf(p, nil, nil, depth+1)
}

// slot returns the n bytes at pos, counted from element i of page p.
func slot(p []byte, i int, pos, n uint64) ([]byte, error) {
	from := uint64(boltPageHeader+i*boltElement) + pos
	if pos > uint64(len(p)) || n > uint64(len(p)) || from+n > uint64(len(p)) {
		return nil, errors.New("entry outside its page")
	}
	return p[from : from+n], nil
}

// ordered reports whether k may follow low (be equal to it if first) and is
// below high.
func ordered(k, low, high []byte, first bool) error {
	c := bytes.Compare(k, low)
	if low != nil && (c < 0 || c == 0 && !first) || high != nil && bytes.Compare(k, high) >= 0 {
		return errors.New("keys out of order")
	}
	return nil
}

// tornTail reports whether a write-ahead file that etcd cut ended in a write
// that was never finished: from the hole that stopped the reader on there is
// nothing but the zeros the file was made of. A record that was once whole has
// its sealed, random content up to its end and leaves no tail of minHole zeros,
// so nothing acknowledged can have been in it. Frames: length u64 (low 56 bits; padding in
// the top byte), record, padding to 8 (etcd server/storage/wal/encoder.go).
func tornTail(path string) (bool, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	last := len(bytes.TrimRight(b, "\x00"))
	off := 0
	for off+8 <= len(b) {
		word := binary.LittleEndian.Uint64(b[off:])
		size := int(word & (1<<56 - 1))
		if word>>63 != 0 {
			size += int(word >> 56 & 7)
		}
		if size == 0 || size > len(b) {
			return false, nil
		}
		if end := off + 8 + size; end > last {
			// The last frame: whole if its end is padding only, torn if more than
			// chance would have it was never written.
			return end-last >= minHole, nil
		}
		off += 8 + size
	}
	return false, nil
}
