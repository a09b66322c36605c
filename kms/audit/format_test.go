package audit_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
)

var update = flag.Bool("update", false, "write testdata anew (a format change: give it a version)")

const golden = "testdata/v1"

// fixedClock dates the golden log.
type fixedClock struct{ now time.Time }

func (c *fixedClock) Now() time.Time {
	c.now = c.now.Add(time.Second)
	return c.now
}

// vectors are events at the edges of the format, in the order of the golden log.
func vectors() []kms.Event {
	at := time.Date(2026, 2, 3, 4, 5, 6, 70000000, time.UTC)
	full := event(1, kms.PhaseOutcome)
	full.Intent, full.Result, full.Change, full.State, full.Note = 2, "ok", 18446744073709551615, []byte{0, 255, 16, 3}, "all fields"
	return []kms.Event{
		event(1, kms.PhaseIntent),
		full,
		{Time: at, Phase: kms.PhaseRefused, Operation: kms.OpKeyRoll, Principal: "person/alice", Result: "denied"},
		{Time: at.In(time.FixedZone("", 3600)), Phase: kms.PhaseSystem, Operation: kms.OpStatus, Principal: "system/kms", Note: "quote \" backslash \\ newline \n tab \t nul \x00 del \x7f é 水 😀 < > &"},
		{Time: at, Phase: kms.PhaseSystem, Operation: kms.OpStatus, Principal: "x", Note: "not UTF-8: \xff\xc3("},
		{Time: time.Date(9999, 12, 31, 23, 59, 59, 999999999, time.UTC), Phase: kms.PhaseSystem, Operation: "o", Principal: "p", Version: 4294967295, Count: 1},
	}
}

func makeGolden(t *testing.T) {
	t.Helper()
	dir := newDir(t)
	cfg := testConfig(t, dir)
	cfg.Clock = &fixedClock{time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	l := open(t, cfg)
	for _, e := range vectors() {
		mustAppend(t, l, e)
	}
	closeLog(t, l)
	der, err := x509.MarshalPKIXPublicKey(testKey().Public())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(golden, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range glob(t, dir, "0*") {
		write(t, filepath.Join(golden, filepath.Base(name)), read(t, name))
	}
	write(t, filepath.Join(golden, "tree"), read(t, filepath.Join(dir, "tree")))
	write(t, filepath.Join(golden, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func goldenKey(t testing.TB) crypto.PublicKey {
	t.Helper()
	block, _ := pem.Decode(read(t, filepath.Join(golden, "key.pem")))
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func goldenLines(t testing.TB) [][]byte {
	t.Helper()
	b := read(t, glob(t, golden, "*.log")[0])
	return bytes.Split(bytes.TrimSuffix(b, []byte("\n")), []byte("\n"))
}

// TestGolden checks that today's code writes and verifies what version 1 wrote.
func TestGolden(t *testing.T) {
	if *update {
		makeGolden(t)
	}
	lines := goldenLines(t)
	if got, want := len(lines), len(vectors())+1; got != want {
		t.Fatalf("%d golden records, want %d", got, want)
	}
	for i, e := range vectors() {
		if got := audit.EncodeRecord(uint64(i+2), e); !bytes.Equal(got, lines[i+1]) {
			t.Errorf("record %d:\n got %s\nwant %s", i+2, got, lines[i+1])
		}
	}
	r, err := audit.Verify(t.Context(), os.DirFS(golden), audit.Check{Keys: []crypto.PublicKey{goldenKey(t)}})
	if err != nil || r.Last != uint64(len(lines)) || r.Newest.Size != r.Last {
		t.Errorf("verify: %+v, %v", r, err)
	}
}

// TestIndependent reads the golden log as FORMAT.md says, with nothing of the
// package: encoding/json, a recursive RFC 6962 tree, and the signature by hand.
func TestIndependent(t *testing.T) {
	lines := goldenLines(t)
	for i, line := range lines {
		var r struct {
			Seq       uint64
			Time      time.Time
			Operation string
			Note      string
			State     []byte
		}
		if err := json.Unmarshal(line, &r); err != nil || r.Seq != uint64(i+1) {
			t.Fatalf("record %d: %+v, %v", i+1, r, err)
		}
		if i == 0 {
			continue
		}
		if e := vectors()[i-1]; !r.Time.Equal(e.Time) || r.Operation != string(e.Operation) || !bytes.Equal(r.State, e.State) || r.Note != string([]rune(e.Note)) {
			t.Errorf("record %d: %+v, want %+v", i+1, r, e)
		}
	}
	text := string(read(t, glob(t, golden, "*.checkpoints")[0]))
	text = text[strings.LastIndex(text, "\nkeyward/audit/")+1:] // the newest
	body, sigs, _ := strings.Cut(text, "\n\n")
	fields := strings.Split(body, "\n")
	if got := fmt.Sprint(len(lines)); fields[1] != got {
		t.Fatalf("checkpoint of %s records, want %s", fields[1], got)
	}
	root := merkle(lines)
	if got := base64.StdEncoding.EncodeToString(root[:]); got != fields[2] {
		t.Errorf("root %s, want %s", got, fields[2])
	}
	parts := strings.Fields(sigs)
	sig, err := base64.StdEncoding.DecodeString(parts[2])
	if err != nil || parts[1] != fields[0] {
		t.Fatalf("signature line %q", sigs)
	}
	der, err := x509.MarshalPKIXPublicKey(goldenKey(t))
	if err != nil {
		t.Fatal(err)
	}
	id := sha256.Sum256(append([]byte(fields[0]+"\n\xffgithub.com/keyward/keyward/audit/ecdsa-p256-sha256\n"), der...))
	if binary.BigEndian.Uint32(sig) != binary.BigEndian.Uint32(id[:]) {
		t.Errorf("key id %x, want %x", sig[:4], id[:4])
	}
	digest := sha256.Sum256([]byte(body + "\n"))
	if !ecdsa.VerifyASN1(goldenKey(t).(*ecdsa.PublicKey), digest[:], sig[4:]) {
		t.Error("the signature does not verify")
	}
}

// merkle is RFC 6962 section 2.1 to the letter.
func merkle(leaves [][]byte) [32]byte {
	switch len(leaves) {
	case 0:
		return sha256.Sum256(nil)
	case 1:
		return sha256.Sum256(append([]byte{0}, leaves[0]...))
	}
	k := 1
	for k*2 < len(leaves) {
		k *= 2
	}
	l, r := merkle(leaves[:k]), merkle(leaves[k:])
	return sha256.Sum256(slices.Concat([]byte{1}, l[:], r[:]))
}

// TestVectorsInDocument keeps FORMAT.md true.
func TestVectorsInDocument(t *testing.T) {
	doc := string(read(t, "FORMAT.md"))
	for _, i := range []int{1, 2} {
		line := goldenLines(t)[i]
		h := tlog.RecordHash(line)
		for _, want := range []string{string(line), hex.EncodeToString(h[:])} {
			if !strings.Contains(doc, want) {
				t.Errorf("FORMAT.md lacks %s", want)
			}
		}
	}
}

func FuzzRecord(f *testing.F) {
	seeds := goldenLines(f)
	if len(seeds) < 5 {
		f.Fatal("no seeds")
	}
	for _, s := range seeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		seq, e, err := audit.ParseRecord(b)
		if err != nil {
			if seq != 0 || e.Operation != "" {
				t.Error("a result and an error")
			}
			return
		}
		if got := audit.EncodeRecord(seq, e); !bytes.Equal(got, b) {
			t.Errorf("parsed\n%q, encoded\n%q", b, got)
		}
		if !json.Valid(b) || bytes.ContainsAny(b, "\n\x00") {
			t.Errorf("accepted what is not one line of JSON: %q", b)
		}
	})
}

func FuzzCheckpoint(f *testing.F) {
	notes, rest := audit.SplitNotes(read(f, glob(f, golden, "*.checkpoints")[0]))
	if len(notes) == 0 || rest != 0 {
		f.Fatal("no seeds")
	}
	key := goldenKey(f)
	for _, n := range notes {
		f.Add(n)
		body, _, _ := bytes.Cut(n, []byte("\n\n"))
		f.Add(append(body, '\n'))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := audit.ParseBody(string(b)); err == nil && c.Body() != string(b) {
			t.Errorf("parsed %q, encoded %q", b, c.Body())
		}
		notes, rest := audit.SplitNotes(b)
		if joined := bytes.Join(notes, nil); !bytes.Equal(joined, b[:len(b)-rest]) {
			t.Errorf("split %q into %q and %d bytes", b, notes, rest)
		}
		if c, err := audit.ParseCheckpoint(b, key); err == nil && (c == nil || !bytes.Equal(c.Text, b)) {
			t.Errorf("accepted %q as %+v", b, c)
		}
	})
}

// FuzzVerify gives Verify a damaged segment beside true checkpoints: it must
// not panic, and must not call whole what differs.
func FuzzVerify(f *testing.F) {
	name := glob(f, golden, "*.log")[0]
	seg, key, files := read(f, name), goldenKey(f), fstest.MapFS{}
	for _, n := range glob(f, golden, "*") {
		files[filepath.Base(n)] = &fstest.MapFile{Data: read(f, n)}
	}
	f.Add(seg)
	f.Add(seg[:len(seg)-7])
	f.Add(append(bytes.Clone(seg), 0, 0, 0))
	f.Add(append(bytes.Clone(seg), "{\"seq\":8,"...))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := maps.Clone(files)
		dir[filepath.Base(name)] = &fstest.MapFile{Data: b}
		_, err := audit.Verify(t.Context(), dir, audit.Check{Keys: []crypto.PublicKey{key}})
		if err == nil && !bytes.HasPrefix(b, seg) {
			t.Error("a changed log was called whole")
		}
	})
}
