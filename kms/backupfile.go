package kms

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/keyward/keyward/dek"
)

// The backup file (FORMAT.md, "Backup").
const (
	backupMagic   = "KWBK"
	backupFormat  = 1
	backupPrefix  = len(backupMagic) + 1 + 4
	maxHeader     = 64 << 10
	backupChunk   = 64 << 10
	maxBackup     = 2 << 30 // of the records in a file, bytes
	maxRecordPath = 1 << 10
	maxRecord     = 4 << 20
)

// The entries in the sealed part.
const (
	entryRecord = iota + 1
	entryCheckpoint
	entryEnd
)

// A backupHeader stands in the clear before the sealed part. The binding of
// the backup key authenticates it.
type backupHeader struct {
	change       uint64
	created      int64 // Unix seconds
	root         dek.ObjectID
	seal         dek.Version // of the system seal key
	installation string
	token        string // for people
	recipient    string // text of the recovery recipient, or empty
	sealed       []byte // system seal key under the root
	recovery     []byte // system seal key to the recipient, or empty
	key          []byte // backup key under the system seal key
}

// encode returns the header; without its last field it is what the last field
// is bound to.
func (h *backupHeader) encode() []byte {
	b := binary.BigEndian.AppendUint64(nil, h.change)
	b = binary.BigEndian.AppendUint64(b, uint64(h.created))
	b = append(b, h.root[:]...)
	b = binary.BigEndian.AppendUint32(b, uint32(h.seal))
	for _, f := range [][]byte{[]byte(h.installation), []byte(h.token), []byte(h.recipient), h.sealed, h.recovery, h.key} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(f)))
		b = append(b, f...)
	}
	return b
}

// binding is the place of the backup key: this header, all but the key itself.
func (h *backupHeader) binding() dek.Binding {
	bare := *h
	bare.key = nil
	sum := sha256.Sum256(bare.encode())
	return dek.Binding{Purpose: dek.PurposeBackup, Vault: h.installation, Object: "key/" + hex.EncodeToString(sum[:]), Version: h.change}
}

// chunkBinding is the place of one chunk; the last one is marked.
func (h *backupHeader) chunkBinding(i uint64, last bool) dek.Binding {
	b := dek.Binding{Purpose: dek.PurposeBackup, Vault: h.installation, Object: "chunk", Version: i}
	if last {
		b.Object = "last-chunk"
	}
	return b
}

// parseBackupHeader is the inverse of encode. It wraps dek.ErrInvalid.
func parseBackupHeader(b []byte) (backupHeader, error) {
	var h backupHeader
	bad := fmt.Errorf("%w: not a Keyward backup, or cut short", dek.ErrInvalid)
	const fixed = 8 + 8 + 16 + 4
	if len(b) < fixed {
		return h, bad
	}
	h.change, h.created = binary.BigEndian.Uint64(b), int64(binary.BigEndian.Uint64(b[8:]))
	copy(h.root[:], b[16:])
	h.seal = dek.Version(binary.BigEndian.Uint32(b[32:]))
	b = b[fixed:]
	var fields [6][]byte
	for i := range fields {
		if len(b) < 4 || uint64(binary.BigEndian.Uint32(b)) > uint64(len(b)-4) {
			return backupHeader{}, bad
		}
		n := int(binary.BigEndian.Uint32(b))
		fields[i], b = bytes.Clone(b[4:4+n]), b[4+n:]
	}
	if len(b) != 0 || h.seal == 0 {
		return backupHeader{}, bad
	}
	h.installation, h.token, h.recipient = string(fields[0]), string(fields[1]), string(fields[2])
	h.sealed, h.recovery, h.key = fields[3], fields[4], fields[5]
	return h, nil
}

// encodeBackup writes a whole file. system is the system seal key of h.seal.
func encodeBackup(w io.Writer, h backupHeader, system *dek.Key, records map[string]Record, checkpoint []byte) error {
	key, err := dek.NewKey()
	if err != nil {
		return err
	}
	defer key.Destroy()
	if err := key.Use(func(b []byte) (err error) {
		h.key, err = system.Seal(h.binding(), b)
		return err
	}); err != nil {
		return fmt.Errorf("seal the backup key: %w", err)
	}
	head := h.encode()
	prefix := append([]byte(backupMagic), backupFormat)
	prefix = binary.BigEndian.AppendUint32(prefix, uint32(len(head)))
	if _, err := w.Write(append(prefix, head...)); err != nil {
		return err
	}
	cw := &chunkWriter{w: w, h: &h, key: key}
	for _, path := range sortedPaths(records) {
		if err := cw.entry(entryRecord, path, records[path].Value); err != nil {
			return err
		}
	}
	if err := cw.entry(entryCheckpoint, "", checkpoint); err != nil {
		return err
	}
	if err := cw.entry(entryEnd, "", binary.BigEndian.AppendUint64(nil, uint64(len(records)))); err != nil {
		return err
	}
	return cw.flush(true)
}

// A chunkWriter seals a byte stream in chunks.
type chunkWriter struct {
	w   io.Writer
	h   *backupHeader
	key *dek.Key
	buf []byte
	n   uint64
}

func (c *chunkWriter) entry(kind byte, path string, value []byte) error {
	c.buf = appendEntry(c.buf, kind, path, value)
	for len(c.buf) > backupChunk { // one byte at least stays for the last chunk
		if err := c.flush(false); err != nil {
			return err
		}
	}
	return nil
}

func appendEntry(b []byte, kind byte, path string, value []byte) []byte {
	b = append(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(path)))
	b = append(b, path...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(value)))
	return append(b, value...)
}

func (c *chunkWriter) flush(last bool) error {
	n := min(len(c.buf), backupChunk)
	sealed, err := c.key.Seal(c.h.chunkBinding(c.n, last), c.buf[:n])
	if err != nil {
		return fmt.Errorf("seal the backup: %w", err)
	}
	c.n++
	c.buf = append(c.buf[:0], c.buf[n:]...)
	if _, err := c.w.Write(binary.BigEndian.AppendUint32(nil, uint32(len(sealed)))); err != nil {
		return err
	}
	_, err = c.w.Write(sealed)
	return err
}

// errBackup is the one answer to a backup that is damaged, cut, or put together
// from others.
func errBackup() error {
	return fmt.Errorf("%w: the backup is damaged or cut short; take another one", dek.ErrCorrupt)
}

// A backupReader reads a file step by step: header first, then, once the
// caller has the system seal key, the rest.
type backupReader struct {
	r      *bufio.Reader
	header backupHeader
}

func readBackupHeader(r io.Reader) (*backupReader, error) {
	br := &backupReader{r: bufio.NewReader(r)}
	prefix := make([]byte, backupPrefix)
	if _, err := io.ReadFull(br.r, prefix); err != nil || string(prefix[:len(backupMagic)]) != backupMagic {
		return nil, fmt.Errorf("%w: not a Keyward backup, or cut short", dek.ErrInvalid)
	}
	if v := prefix[len(backupMagic)]; v != backupFormat {
		return nil, fmt.Errorf("%w: backup format %d is not known to this release", dek.ErrInvalid, v)
	}
	n := binary.BigEndian.Uint32(prefix[len(backupMagic)+1:])
	if n > maxHeader {
		return nil, fmt.Errorf("%w: not a Keyward backup", dek.ErrInvalid)
	}
	head := make([]byte, n)
	if _, err := io.ReadFull(br.r, head); err != nil {
		return nil, fmt.Errorf("%w: not a Keyward backup, or cut short", dek.ErrInvalid)
	}
	var err error
	br.header, err = parseBackupHeader(head)
	return br, err
}

// content verifies and reads the whole rest; nothing is returned unless all of
// it is there.
func (br *backupReader) content(system *dek.Key) (map[string]Record, []byte, error) {
	raw, err := system.Open(br.header.binding(), br.header.key)
	if err != nil {
		return nil, nil, errBackup()
	}
	key, err := dek.KeyFrom(raw)
	if err != nil {
		return nil, nil, errBackup()
	}
	defer key.Destroy()
	plain, err := br.plain(key)
	if err != nil {
		return nil, nil, err
	}
	return parseEntries(plain)
}

// plain joins the chunks.
func (br *backupReader) plain(key *dek.Key) ([]byte, error) {
	var out []byte
	var size [4]byte
	for i := uint64(0); ; i++ {
		if _, err := io.ReadFull(br.r, size[:]); err != nil {
			return nil, errBackup()
		}
		n := binary.BigEndian.Uint32(size[:])
		if n > backupChunk+dek.SealOverhead || len(out) > maxBackup {
			return nil, errBackup()
		}
		sealed := make([]byte, n)
		if _, err := io.ReadFull(br.r, sealed); err != nil {
			return nil, errBackup()
		}
		_, err := br.r.Peek(1)
		last := errors.Is(err, io.EOF)
		chunk, err := key.Open(br.header.chunkBinding(i, last), sealed)
		if err != nil {
			return nil, errBackup()
		}
		out = append(out, chunk...)
		if last {
			return out, nil
		}
	}
}

// parseEntries takes the sealed part apart. Paths ascend, the checkpoint and
// the count of records close it. It wraps dek.ErrCorrupt.
func parseEntries(b []byte) (map[string]Record, []byte, error) {
	records := make(map[string]Record)
	var checkpoint []byte
	last, stage := "", byte(entryRecord)
	for len(b) > 0 {
		kind, path, value, rest, ok := cutEntry(b)
		if !ok || kind < stage {
			return nil, nil, errBackup()
		}
		b = rest
		switch kind {
		case entryRecord:
			if path <= last {
				return nil, nil, errBackup()
			}
			records[path], last = Record{Path: path, Value: value}, path
		case entryCheckpoint:
			checkpoint, stage = value, entryEnd
		case entryEnd:
			if stage != entryEnd || len(value) != 8 || binary.BigEndian.Uint64(value) != uint64(len(records)) || len(b) != 0 {
				return nil, nil, errBackup()
			}
			return records, checkpoint, nil
		default:
			return nil, nil, errBackup()
		}
	}
	return nil, nil, errBackup()
}

func cutEntry(b []byte) (kind byte, path string, value, rest []byte, ok bool) {
	if len(b) < 5 {
		return 0, "", nil, nil, false
	}
	kind = b[0]
	n := binary.BigEndian.Uint32(b[1:])
	if b = b[5:]; n > maxRecordPath || uint64(len(b)) < uint64(n)+4 {
		return 0, "", nil, nil, false
	}
	path, b = string(b[:n]), b[n:]
	m := binary.BigEndian.Uint32(b)
	if b = b[4:]; m > maxRecord || uint64(len(b)) < uint64(m) || kind != entryRecord && path != "" {
		return 0, "", nil, nil, false
	}
	return kind, path, b[:m:m], b[m:], true
}
