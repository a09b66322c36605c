package audit_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// written makes a closed log of several segments and returns its head.
func written(t testing.TB, pairs int) (dir string, head []byte) {
	t.Helper()
	dir = newDir(t)
	l := open(t, testConfig(t, dir))
	act(t, l, pairs)
	closeLog(t, l)
	head, err := l.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return dir, head
}

func copyDir(t testing.TB, from string) string {
	t.Helper()
	to := newDir(t)
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(to, 0o700); err != nil {
		t.Fatal(err)
	}
	return to
}

func glob(t testing.TB, dir, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t testing.TB, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func remove(t testing.TB, names ...string) {
	t.Helper()
	for _, n := range names {
		if err := os.Remove(n); err != nil {
			t.Fatal(err)
		}
	}
}

// edit lets f change the records of the segment that holds seq; i is the place
// of seq in it.
func edit(t *testing.T, dir string, seq uint64, f func(lines [][]byte, i int) [][]byte) {
	t.Helper()
	segs := glob(t, dir, "*.log")
	for n := len(segs) - 1; n >= 0; n-- {
		var first uint64
		if _, err := fmt.Sscanf(filepath.Base(segs[n]), "%d.log", &first); err != nil {
			t.Fatal(err)
		}
		if first > seq {
			continue
		}
		lines := bytes.SplitAfter(read(t, segs[n]), []byte("\n"))
		write(t, segs[n], bytes.Join(f(lines[:len(lines)-1], int(seq-first)), nil))
		return
	}
}

// renumber gives the records of lines consecutive sequences from first on.
func renumber(lines [][]byte, first uint64) [][]byte {
	out := make([][]byte, len(lines))
	for i, line := range lines {
		_, rest, _ := bytes.Cut(line, []byte(","))
		out[i] = fmt.Appendf(nil, `{"seq":%d,%s`, first+uint64(i), rest)
	}
	return out
}
