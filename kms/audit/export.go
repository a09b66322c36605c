package audit

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/keyward/keyward/dek"
)

// KeyName is the file of an export that holds the audit key's public half
// (PEM, SubjectPublicKeyInfo), and with a linked log the older one's too. It
// says who signed; whether to believe it is for the reader, who compares it
// with a copy of an earlier export or with what the key service shows.
const KeyName = "audit-key.pem"

// Export writes a tar archive of the log for offline verification: every
// checkpoint, every record on disk, the stored hashes and the public keys. It
// may run while others append. Checkpoints are read first, so that none of them
// covers a record that is not in the archive. A damaged log is exported as it
// is; Verify tells. It wraps dek.ErrUnavailable if a file can't be read or w
// fails. Memory does not grow with the log.
func (l *Log) Export(ctx context.Context, w io.Writer) error {
	tw := tar.NewWriter(w)
	key, err := l.publicKeys()
	if err == nil {
		err = addFile(tw, KeyName, bytes.NewReader(key), int64(len(key)))
	}
	if err == nil {
		err = l.addAll(ctx, tw, checkpointSuffix, addCheckpoints)
	}
	size := l.Size() // from here on: what a checkpoint covers is below
	if err == nil {
		err = l.addAll(ctx, tw, segmentSuffix, func(tw *tar.Writer, f *os.File, first uint64) error {
			return addSegment(tw, f, first, size)
		})
	}
	if err == nil {
		end := l.tree.offset(size)
		err = addFile(tw, treeName, io.NewSectionReader(l.tree.f, 0, end), end)
	}
	if err == nil {
		err = tw.Close()
	}
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil && !errors.Is(err, dek.ErrCorrupt) && !errors.Is(err, dek.ErrInvalid) {
		return fmt.Errorf("%w: audit: export: %w", dek.ErrUnavailable, err)
	}
	return err
}

// addAll hands every file with suffix to add.
func (l *Log) addAll(ctx context.Context, tw *tar.Writer, suffix string, add func(*tar.Writer, *os.File, uint64) error) error {
	firsts, err := listFiles(os.DirFS(l.cfg.Dir), suffix)
	if err != nil {
		return err
	}
	for _, first := range firsts {
		if err := ctx.Err(); err != nil {
			return err
		}
		f, err := os.Open(filepath.Join(l.cfg.Dir, fileName(first, suffix)))
		if err != nil {
			return err
		}
		err = add(tw, f, first)
		f.Close() // only read
		if err != nil {
			return err
		}
	}
	return nil
}

// addCheckpoints adds a file up to its last whole line.
func addCheckpoints(tw *tar.Writer, f *os.File, first uint64) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	tail := make([]byte, min(st.Size(), maxCheckpoint))
	at := st.Size() - int64(len(tail))
	if _, err := f.ReadAt(tail, at); err != nil {
		return err
	}
	end := at + int64(bytes.LastIndexByte(tail, '\n')+1)
	return addFile(tw, fileName(first, checkpointSuffix), f, end)
}

// addSegment adds the records up to last.
func addSegment(tw *tar.Writer, f *os.File, first, last uint64) error {
	if first > last {
		return nil // begun, and nothing in it is on disk yet
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	at := seekRecord(f, st.Size(), first, last)
	end := at.off
	sc := newScanner(io.NewSectionReader(f, at.off, st.Size()-at.off))
	for seq := at.seq; seq <= last; seq++ {
		ok, err := sc.next()
		if err != nil && !errors.Is(err, errRecord) {
			return err
		}
		if err != nil || !ok {
			break // another segment follows, or the log is damaged
		}
		end = at.off + sc.off
	}
	return addFile(tw, fileName(first, segmentSuffix), io.NewSectionReader(f, 0, end), end)
}

func addFile(tw *tar.Writer, name string, r io.Reader, size int64) error {
	err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatPAX})
	if err != nil {
		return err
	}
	_, err = io.CopyN(tw, r, size)
	return err
}

func (l *Log) publicKeys() ([]byte, error) {
	keys := []crypto.PublicKey{l.cfg.Signer.Public()}
	if l.link != nil {
		keys = append(keys, l.link.key)
	}
	var out bytes.Buffer
	for _, k := range keys {
		der, err := x509.MarshalPKIXPublicKey(k)
		if err != nil {
			return nil, fmt.Errorf("%w: audit: export: %w", dek.ErrInvalid, err)
		}
		if err := pem.Encode(&out, &pem.Block{Type: "PUBLIC KEY", Bytes: der}); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), nil
}
