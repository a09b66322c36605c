package kms

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
)

func TestSum(t *testing.T) {
	random := func() sum {
		b := make([]byte, 32)
		rand.Read(b)
		return sumFrom(b)
	}
	for range 1000 {
		a, b, c := random(), random(), random()
		if a.add(b).add(c) != c.add(a).add(b) {
			t.Fatal("the order of additions matters")
		}
		if a.add(b).sub(b) != a || a.sub(b).add(b) != a {
			t.Fatal("taking away is not the inverse of adding")
		}
		if sumFrom(a.bytes()) != a {
			t.Fatal("bytes do not read back")
		}
	}
	all := bytes.Repeat([]byte{0xff}, 32)
	if got := sumFrom(all).add(sum{1}); got != (sum{}) {
		t.Errorf("2^256-1 + 1 = %x", got)
	}
}

// TestTable compares a table with a map and sees that older tables stay as
// they were.
func TestTable(t *testing.T) {
	var now table[int]
	model := make(map[string]int)
	type old struct {
		tab   table[int]
		model map[string]int
	}
	var olds []old
	for i := range uint64(5000) {
		if i%500 == 0 {
			c := make(map[string]int)
			for k, v := range model {
				c[k] = v
			}
			olds = append(olds, old{now, c})
		}
		key := fmt.Sprint("k", i*7919%1000)
		if i%5 == 4 {
			now.remove(i, key)
			delete(model, key)
		} else {
			now.set(i, key, int(i))
			model[key] = int(i)
		}
	}
	for i, o := range append(olds, old{now, model}) {
		n := 0
		for k, v := range o.tab.all() {
			n++
			if o.model[k] != v {
				t.Fatalf("table %d: %s is %d, want %d", i, k, v, o.model[k])
			}
		}
		if n != len(o.model) || o.tab.n != n {
			t.Fatalf("table %d: %d entries, n %d, want %d", i, n, o.tab.n, len(o.model))
		}
	}
}

// TestViewCost makes 100,000 changes: the view stays small and a change cheap,
// however many there were.
func TestViewCost(t *testing.T) {
	const changes, rings = 100_000, 1000
	v := &view{}
	rec := encode(&ringRecord{MasterKey: "k"})
	for i := range rings {
		if err := v.apply(1, ringPath("v", fmt.Sprint("r", i)), rec); err != nil {
			t.Fatal(err)
		}
	}
	version := encode(&ringVersionRecord{State: Enabled, Master: 1, Wrapped: make([]byte, 600), Request: "x"})
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	start := time.Now()
	for i := range changes {
		next := *v
		next.change = uint64(i + 2)
		path := versionPath(ringPath("v", fmt.Sprint("r", i%rings)), dek.Version(1+i/rings%10))
		if err := next.apply(next.change, path, version); err != nil {
			t.Fatal(err)
		}
		v = &next
	}
	per := time.Since(start) / changes
	runtime.GC()
	runtime.ReadMemStats(&after)
	grown := int64(after.HeapAlloc) - int64(before.HeapAlloc)
	t.Logf("%s per change, %d bytes held for %d versions", per, grown, rings*10)
	if grown > rings*10*4096 {
		t.Errorf("%d bytes held after %d changes of %d records", grown, changes, rings*10)
	}
	if per > time.Millisecond {
		t.Errorf("%s per change", per)
	}
	runtime.KeepAlive(v)
}

func goodHeader() backupHeader {
	return backupHeader{change: 7, created: 1700000000, root: dek.ObjectID{1}, seal: 1, installation: "aa", token: "t",
		recipient: "r", sealed: []byte("sealed"), recovery: []byte("copy"), key: []byte("key")}
}

func TestBackupHeader(t *testing.T) {
	h := goodHeader()
	b := h.encode()
	got, err := parseBackupHeader(b)
	if err != nil || !bytes.Equal(got.encode(), b) {
		t.Fatalf("round trip: %v", err)
	}
	for i := range b {
		if _, err := parseBackupHeader(b[:i]); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("prefix of %d bytes: %v", i, err)
		}
	}
	if _, err := parseBackupHeader(append(b, 0)); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("trailing byte: %v", err)
	}
}

func TestEntries(t *testing.T) {
	entry := func(kind byte, path, value string) []byte {
		w := &chunkWriter{}
		if err := w.entry(kind, path, []byte(value)); err != nil {
			t.Fatal(err)
		}
		return w.buf
	}
	a, b := entry(entryRecord, "a", "1"), entry(entryRecord, "b", "2")
	point, end := entry(entryCheckpoint, "", "c"), entry(entryEnd, "", "\x00\x00\x00\x00\x00\x00\x00\x02")
	cases := map[string]struct {
		parts [][]byte
		ok    bool
	}{
		"good":           {[][]byte{a, b, point, end}, true},
		"order":          {[][]byte{b, a, point, end}, false},
		"twice":          {[][]byte{a, a, point, end}, false},
		"count":          {[][]byte{a, point, end}, false},
		"no checkpoint":  {[][]byte{a, b, end}, false},
		"no end":         {[][]byte{a, b, point}, false},
		"after the end":  {[][]byte{a, b, point, end, end}, false},
		"record late":    {[][]byte{a, point, b, end}, false},
		"unknown kind":   {[][]byte{a, b, point, entry(9, "", "")}, false},
		"path at marker": {[][]byte{a, b, entry(entryCheckpoint, "x", "c"), end}, false},
		"empty":          {nil, false},
	}
	for name, c := range cases {
		_, _, err := parseEntries(bytes.Join(c.parts, nil))
		if (err == nil) != c.ok || err != nil && !errors.Is(err, dek.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// seeds returns the files of a seed folder; an empty one fails.
func seeds(t testing.TB, dir string) [][]byte {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", dir, "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no seeds in testdata/%s: %v", dir, err)
	}
	var out [][]byte
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b)
	}
	return out
}

func FuzzParseBackupHeader(f *testing.F) {
	for _, s := range seeds(f, "headers") {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseBackupHeader(b)
		if err != nil {
			if h.sealed != nil || h.installation != "" {
				t.Error("result and error")
			}
			return
		}
		if !bytes.Equal(h.encode(), b) {
			t.Error("parse and encode differ")
		}
	})
}

func FuzzParseEntries(f *testing.F) {
	for _, s := range seeds(f, "entries") {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		records, checkpoint, err := parseEntries(b)
		if err != nil {
			if records != nil || checkpoint != nil {
				t.Error("result and error")
			}
			return
		}
		w := &chunkWriter{h: &backupHeader{}}
		for _, path := range sortedPaths(records) {
			w.buf = appendEntry(w.buf, entryRecord, path, records[path].Value)
		}
		w.buf = appendEntry(w.buf, entryCheckpoint, "", checkpoint)
		w.buf = appendEntry(w.buf, entryEnd, "", []byte{0, 0, 0, 0, 0, 0, byte(len(records) >> 8), byte(len(records))})
		if len(records) < 1<<16 && !bytes.Equal(w.buf, b) {
			t.Error("parse and encode differ")
		}
	})
}

func FuzzParseToken(f *testing.F) {
	for _, s := range seeds(f, "tokens") {
		f.Add(string(s))
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, hash, ok := parseToken(TokenText(s))
		if !ok && (id != "" || hash != [32]byte{}) {
			t.Error("result of a refused text")
		}
	})
}

func FuzzReadBackup(f *testing.F) {
	for _, s := range seeds(f, "files") {
		f.Add(s)
	}
	key, err := dek.KeyFrom(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := readBackupHeader(bytes.NewReader(b))
		if err != nil {
			return
		}
		records, _, err := r.content(key)
		if err != nil && records != nil {
			t.Error("records and error")
		}
	})
}
