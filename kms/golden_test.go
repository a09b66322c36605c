package kms

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/keyward/keyward/dek"
)

var update = flag.Bool("update", false, "write the golden files anew (only for a new format version)")

// goldenKey is the system seal key of the golden files: 32 times 7.
func goldenKey(t testing.TB) *dek.Key {
	t.Helper()
	k, err := dek.KeyFrom(bytes.Repeat([]byte{7}, dek.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Destroy)
	return k
}

func goldenRecords() map[string]Record {
	return map[string]Record{"a/b": {Path: "a/b", Value: []byte("one")}, "c": {Path: "c", Value: bytes.Repeat([]byte("x"), 70_000)}}
}

const goldenCheckpoint = "log\n1\nroot\n"

// writeGolden makes the golden files, and seeds from them.
func writeGolden(t *testing.T, backup, record string, s *sealer, key *dek.Key) {
	t.Helper()
	var b bytes.Buffer
	if err := encodeBackup(&b, goodHeader(), key, goldenRecords(), []byte(goldenCheckpoint)); err != nil {
		t.Fatal(err)
	}
	v, err := s.seal("keys/v/k", 9, []byte(`{"bits":3072}`))
	if err != nil {
		t.Fatal(err)
	}
	var tiny bytes.Buffer
	one := map[string]Record{"a": {Path: "a", Value: []byte("1")}}
	if err := encodeBackup(&tiny, goodHeader(), key, one, []byte(goldenCheckpoint)); err != nil {
		t.Fatal(err)
	}
	h := goodHeader()
	small := appendEntry(nil, entryRecord, "a", []byte("1"))
	small = appendEntry(small, entryCheckpoint, "", []byte("c"))
	small = appendEntry(small, entryEnd, "", []byte{0, 0, 0, 0, 0, 0, 0, 1})
	for path, content := range map[string][]byte{
		backup: b.Bytes(), record: v,
		filepath.Join("testdata", "files", "good"):    tiny.Bytes(),
		filepath.Join("testdata", "files", "cut"):     tiny.Bytes()[:tiny.Len()-9],
		filepath.Join("testdata", "headers", "good"):  h.encode(),
		filepath.Join("testdata", "headers", "short"): h.encode()[:30],
		filepath.Join("testdata", "entries", "good"):  small,
		filepath.Join("testdata", "entries", "cut"):   small[:9],
		filepath.Join("testdata", "tokens", "good"):   []byte("kwt1_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"),
		filepath.Join("testdata", "tokens", "short"):  []byte("kwt1_AAAA"),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestGolden reads what every release must read for ever.
func TestGolden(t *testing.T) {
	backup, record := filepath.Join("testdata", "backups", "v1.kwbk"), filepath.Join("testdata", "record-v1.bin")
	key := goldenKey(t)
	s, err := newSealer("aabb", map[dek.Version]*dek.Key{1: key}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		writeGolden(t, backup, record, s, key)
	}
	value, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	plain, n, err := s.open("keys/v/k", value)
	if err != nil || n != 9 || string(plain) != `{"bits":3072}` {
		t.Errorf("record: %q, change %d, %v", plain, n, err)
	}
	const wantTerm = "c4e7f4db" // first bytes of the record's term in the digest
	if term := hex.EncodeToString(s.term("keys/v/k", 9, []byte("value")).bytes()); term[:8] != wantTerm {
		t.Errorf("term %s, want %s...", term, wantTerm)
	}
	file, err := os.ReadFile(backup)
	if err != nil {
		t.Fatal(err)
	}
	br, err := readBackupHeader(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	records, checkpoint, err := br.content(key)
	if err != nil || string(checkpoint) != goldenCheckpoint || len(records) != 2 || string(records["a/b"].Value) != "one" {
		t.Errorf("backup: %d records, %q, %v", len(records), checkpoint, err)
	}
}

// openIndependently opens one sealed piece by FORMAT.md.
func openIndependently(t *testing.T, key, sealed []byte, installation, object string, version uint64) []byte {
	t.Helper()
	sub, err := hkdf.Key(sha256.New, key, nil, "keyward/seal/v1/backup", 32)
	if err != nil {
		t.Fatal(err)
	}
	aad := []byte{1, 6} // format, purpose
	for _, s := range []string{installation, object} {
		aad = binary.BigEndian.AppendUint16(aad, uint16(len(s)))
		aad = append(aad, s...)
	}
	aad = binary.BigEndian.AppendUint64(aad, version)
	block, err := aes.NewCipher(sub)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := gcm.Open(nil, sealed[1:13], sealed[13:], aad)
	if err != nil {
		t.Fatalf("%s %d: %v", object, version, err)
	}
	return plain
}

// TestIndependentDecoder opens the golden backup by FORMAT.md alone, with
// nothing of this package or of dek.
func TestIndependentDecoder(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("testdata", "backups", "v1.kwbk"))
	if err != nil {
		t.Fatal(err)
	}
	u32 := func() int { n := binary.BigEndian.Uint32(b); b = b[4:]; return int(n) }
	cut := func(n int) []byte { p := b[:n]; b = b[n:]; return p }
	if string(cut(5)) != "KWBK\x01" {
		t.Fatal("magic")
	}
	head := cut(u32())
	rest := b
	b = head
	change := binary.BigEndian.Uint64(cut(8))
	cut(8 + 16 + 4)
	var fields [6][]byte
	for i := range fields {
		fields[i] = cut(u32())
	}
	bare := append(bytes.Clone(head[:len(head)-len(fields[5])-4]), 0, 0, 0, 0)
	digest := sha256.Sum256(bare)
	open := func(key, sealed []byte, object string, version uint64) []byte {
		return openIndependently(t, key, sealed, string(fields[0]), object, version)
	}
	key := open(bytes.Repeat([]byte{7}, 32), fields[5], "key/"+hex.EncodeToString(digest[:]), change)
	var plain []byte
	b = rest
	for i := uint64(0); len(b) > 0; i++ {
		sealed := cut(u32())
		object := "chunk"
		if len(b) == 0 {
			object = "last-chunk"
		}
		plain = append(plain, open(key, sealed, object, i)...)
	}
	b = plain
	var got []string
	for len(b) > 0 {
		kind := cut(1)[0]
		path := string(cut(u32()))
		value := cut(u32())
		if kind == 1 {
			got = append(got, path)
		}
		if kind == 2 && string(value) != goldenCheckpoint {
			t.Errorf("checkpoint %q", value)
		}
	}
	if len(got) != 2 || got[0] != "a/b" || got[1] != "c" {
		t.Errorf("records %q", got)
	}
}
