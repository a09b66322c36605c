package audit_test

import (
	"archive/tar"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
)

// unpack reads an export as an auditor would.
func unpack(t testing.TB, b []byte) fstest.MapFS {
	t.Helper()
	files := fstest.MapFS{}
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil || int64(len(data)) != h.Size {
			t.Fatalf("%s: %d bytes of %d (%v)", h.Name, len(data), h.Size, err)
		}
		files[h.Name] = &fstest.MapFile{Data: data, Mode: 0o600}
	}
}

func export(t testing.TB, l *audit.Log) fstest.MapFS {
	t.Helper()
	var b bytes.Buffer
	if err := l.Export(t.Context(), &b); err != nil {
		t.Fatalf("export: %v", err)
	}
	return unpack(t, b.Bytes())
}

// keysOf reads the public keys of an export.
func keysOf(t testing.TB, files fstest.MapFS) (keys []crypto.PublicKey) {
	t.Helper()
	for rest := files[audit.KeyName].Data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return keys
		}
		k, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
	}
}

func checkExport(t testing.TB, files fstest.MapFS) audit.Report {
	t.Helper()
	r, err := audit.Verify(t.Context(), files, audit.Check{Keys: keysOf(t, files)})
	if err != nil {
		t.Fatalf("verify the export: %v", err)
	}
	return r
}

// TestExport: what is exported while others append is whole, holds everything
// that was on disk before, and shows what is done to it.
func TestExport(t *testing.T) {
	l := open(t, testConfig(t, newDir(t)))
	defer closeLog(t, l)
	act(t, l, 300)
	stop := make(chan struct{})
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := l.Append(t.Context(), event(w*1000+i, kms.PhaseRefused)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 10 {
		before := l.Size()
		files := export(t, l)
		r := checkExport(t, files)
		if r.Last < before || r.Torn != 0 || r.First != 1 {
			t.Errorf("got %d to %d, %d torn bytes; %d records were on disk before", r.First, r.Last, r.Torn, before)
		}
	}
	close(stop)
	writers.Wait()
	files := export(t, l)
	const name = "00000000000000000001.log"
	files[name].Data = bytes.Replace(files[name].Data, []byte("c0ffee00000007"), []byte("c0ffee00000008"), 1)
	r, err := audit.Verify(t.Context(), files, audit.Check{Keys: keysOf(t, files)})
	if !errors.Is(err, dek.ErrCorrupt) || r.Problem.Seq != 16 || r.Problem.Last != 16 {
		t.Errorf("a changed record in the export: got %v, want record 16 named", err)
	}
}

// TestExportAfterRemove: an export without the oldest segments can be verified.
func TestExportAfterRemove(t *testing.T) {
	l := open(t, testConfig(t, newDir(t)))
	defer closeLog(t, l)
	act(t, l, 300)
	for l.Newest().Size != l.Size() {
	}
	through, err := l.Remove(t.Context(), l.Newest().Text)
	if err != nil || through == 0 {
		t.Fatalf("removed through %d: %v", through, err)
	}
	if r := checkExport(t, export(t, l)); r.First != through+1 {
		t.Errorf("first is %d, want %d", r.First, through+1)
	}
}

// TestExportLinked: the export of a log that follows another one holds both
// keys, so that the link can be checked.
func TestExportLinked(t *testing.T) {
	_, head := written(t, 20)
	fresh, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cfg := testConfig(t, newDir(t))
	cfg.Signer, cfg.Link = fresh, &audit.Link{Checkpoint: head, Key: testKey().Public()}
	l := open(t, cfg)
	defer closeLog(t, l)
	files := export(t, l)
	keys := keysOf(t, files)
	if len(keys) != 2 || !fresh.PublicKey.Equal(keys[0]) || !testKey().PublicKey.Equal(keys[1]) {
		t.Errorf("got %d keys, want the new one and the old one", len(keys))
	}
	if r := checkExport(t, files); r.Previous == nil || !r.PreviousOK {
		t.Errorf("previous log: %+v, trusted %v", r.Previous, r.PreviousOK)
	}
}

// TestExportFaults: a writer that fails gives an error; a damaged log can be
// exported as evidence, and the export shows the damage.
func TestExportFaults(t *testing.T) {
	dir := newDir(t)
	l := open(t, testConfig(t, dir))
	act(t, l, 300)
	var whole bytes.Buffer
	if err := l.Export(t.Context(), &whole); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 100, 600, 5000, whole.Len() / 2, whole.Len() - 1} {
		if err := l.Export(t.Context(), &limited{left: n}); !errors.Is(err, dek.ErrUnavailable) {
			t.Errorf("writer that takes %d of %d bytes: got %v, want ErrUnavailable", n, whole.Len(), err)
		}
	}
	closeLog(t, l)
	l = open(t, testConfig(t, dir))
	defer closeLog(t, l)
	remove(t, glob(t, dir, "*.log")[0])
	files := export(t, l)
	r, err := audit.Verify(t.Context(), files, audit.Check{Keys: keysOf(t, files)})
	if !errors.Is(err, dek.ErrCorrupt) || r.Problem == nil || r.Problem.Seq != 1 {
		t.Errorf("a segment is gone: got %v, want it found in the export", err)
	}
}

// A limited writer takes so many bytes.
type limited struct{ left int }

func (w *limited) Write(p []byte) (int, error) {
	n := min(len(p), w.left)
	w.left -= n
	if n < len(p) {
		return n, io.ErrShortWrite
	}
	return n, nil
}
