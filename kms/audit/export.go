package audit

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
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
// checkpoint file, every segment up to its last whole record, and the public
// key. It may run while others append. Checkpoints are read first, so that
// none of them covers a record that is not in the archive.
func (l *Log) Export(ctx context.Context, w io.Writer) error {
	tw := tar.NewWriter(w)
	dir := os.DirFS(l.cfg.Dir)
	key, err := l.publicKeys()
	if err == nil {
		err = addFile(tw, KeyName, key)
	}
	if err != nil {
		return err
	}
	for _, suffix := range []string{checkpointSuffix, segmentSuffix} {
		firsts, err := listFiles(dir, suffix)
		if err != nil {
			return err
		}
		for _, first := range firsts {
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("%w: audit: export: %w", dek.ErrUnavailable, err)
			}
			if err := l.addWhole(tw, fileName(first, suffix)); err != nil {
				return err
			}
		}
	}
	if err := tw.Close(); err != nil {
		return fmt.Errorf("%w: audit: export: %w", dek.ErrUnavailable, err)
	}
	return nil
}

// addWhole adds the whole lines of one file. A segment is at most a few dozen
// megabytes, so that it may be held in memory to know its length.
func (l *Log) addWhole(tw *tar.Writer, name string) error {
	b, err := os.ReadFile(filepath.Join(l.cfg.Dir, name))
	if err != nil {
		return fmt.Errorf("%w: audit: export: %w", dek.ErrUnavailable, err)
	}
	if nul := bytes.IndexByte(b, 0); nul >= 0 { // room made ahead
		b = b[:nul]
	}
	return addFile(tw, name, b[:bytes.LastIndexByte(b, '\n')+1])
}

func addFile(tw *tar.Writer, name string, b []byte) error {
	err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(b)), ModTime: time.Unix(0, 0), Format: tar.FormatPAX})
	if err == nil {
		_, err = tw.Write(b)
	}
	if err != nil {
		return fmt.Errorf("%w: audit: export: %w", dek.ErrUnavailable, err)
	}
	return nil
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
