package etcdstore_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/etcdstore"
)

// filled makes a closed store with some hundred records and history.
func filled(t *testing.T) string {
	t.Helper()
	dir := newDir(t)
	s := open(t, dir)
	revs := map[string]int64{}
	for i := range 1500 {
		p := fmt.Sprintf("r/%03d", i%300)
		rev, err := s.Commit(t.Context(), []kms.Change{{Path: p, Value: sealed(100 + i%900), Expect: revs[p]}})
		if err != nil {
			t.Fatal(err)
		}
		revs[p] = rev
	}
	closeStore(t, s)
	return dir
}

func copyDir(t *testing.T, from string) string {
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

func flip(t *testing.T, path string, bit int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], bit/8); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << (bit % 8)
	if _, err := f.WriteAt(b[:], bit/8); err != nil {
		t.Fatal(err)
	}
}

func only(t *testing.T, pattern string) string {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil || len(names) == 0 {
		t.Fatalf("%s: %v %v", pattern, names, err)
	}
	return names[len(names)-1]
}

// TestFlips flips single bits of a closed store. It must be refused or work;
// whether a value was changed is for the layer above, which sealed it. A
// process of its own shows panics in etcd's goroutines.
func TestFlips(t *testing.T) {
	base := filled(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	for _, c := range []struct {
		name, pattern string
		rounds        int
	}{
		{"database", "member/snap/db", 30},
		{"database structure", "member/snap/db", 30},
		{"write-ahead log", "member/wal/*.wal", 18},
	} {
		t.Run(c.name, func(t *testing.T) {
			refused, opened := 0, 0
			if testing.Short() {
				c.rounds /= 6
			}
			for i := range c.rounds {
				dir := copyDir(t, base)
				path := only(t, filepath.Join(dir, c.pattern))
				bit := pick(t, rng, path, c.name == "database structure")
				flip(t, path, bit)
				if t.Failed() {
					t.Fatalf("stopped at bit %d", bit)
				}
				lines := run(t, "look", dir, 0)
				if text, ok := strings.CutPrefix(lines[0], "refused: "); ok {
					if refused++; !strings.Contains(text, dek.ErrCorrupt.Error()) || !strings.Contains(text, dir) {
						t.Errorf("round %d, bit %d: refused with %s", i, bit, text)
					}
				} else {
					opened++
				}
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("%d refused, %d opened", refused, opened)
		})
	}
}

// pick chooses a bit: anywhere that is not zero, or in the head of a page.
func pick(t *testing.T, rng *rand.Rand, path string, heads bool) int64 {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for {
		at := rng.IntN(len(b))
		if heads {
			at = at/4096*4096 + rng.IntN(64)
		}
		near := b[at&^63 : min(at&^63+64, len(b))]
		if strings.Trim(string(near), "\x00") != "" {
			return int64(at*8 + rng.IntN(8))
		}
	}
}

func TestBroken(t *testing.T) {
	dir := filled(t)
	wal := only(t, filepath.Join(dir, "member/wal/*.wal"))
	b, err := os.ReadFile(wal)
	if err != nil {
		t.Fatal(err)
	}
	end := len(strings.TrimRight(string(b), "\x00"))
	at := (end + 7) &^ 7
	half := halfRecord(at)
	for _, c := range []struct {
		name string
		cut  func([]byte) // makes the file that etcd would have kept
		want error
	}{
		{"hole in the middle", func(b []byte) { clear(b[end/2&^511 : end/2&^511+512]) }, dek.ErrCorrupt},
		{"unfinished write at the end", func(b []byte) { copy(b[at:], half) }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := copyDir(t, dir)
			broken := append([]byte(nil), b...)
			c.cut(broken)
			if err := os.WriteFile(wal2(dir, wal)+".broken", broken, 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := etcdstore.Open(t.Context(), etcdstore.Config{Dir: dir})
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if err == nil {
				closeStore(t, s)
			} else if !strings.Contains(err.Error(), "keyward-kms restore") || !strings.Contains(err.Error(), dir) {
				t.Errorf("the text names no way on: %v", err)
			}
		})
	}
}

func wal2(dir, wal string) string { return filepath.Join(dir, "member", "wal", filepath.Base(wal)) }

// halfRecord is a record of 3000 bytes at offset at of which the first two or
// three sectors were written.
func halfRecord(at int) []byte {
	return append([]byte{0xb8, 0x0b, 0, 0, 0, 0, 0, 0}, sealed(1024+512-at%512-8)...)
}

// TestTornWrite leaves a half-written record at the end of the log, as a power
// cut does: the store opens with everything before it.
func TestTornWrite(t *testing.T) {
	dir := filled(t)
	wal := only(t, filepath.Join(dir, "member/wal/*.wal"))
	b, err := os.ReadFile(wal)
	if err != nil {
		t.Fatal(err)
	}
	end := len(strings.TrimRight(string(b), "\x00"))
	f, err := os.OpenFile(wal, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := (end + 7) &^ 7
	if _, err := f.WriteAt(halfRecord(at), int64(at)); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	defer closeStore(t, s)
	n := 0
	if _, err := s.Load(t.Context(), func(kms.Record) error { n++; return nil }); err != nil || n != 300 {
		t.Errorf("%d records (%v), want 300", n, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "member/wal/*.broken")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// needRoot skips, or fails where every integration must run.
func needRoot(t *testing.T, tool string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	if tool == "" {
		return
	}
	if _, err := exec.LookPath(tool); err != nil {
		if os.Getenv("KEYWARD_REQUIRE_INTEGRATION") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// TestDiskFull fills a small file system: the process says so in clear text and
// does not die, and after space was made nothing acknowledged is missing.
func TestDiskFull(t *testing.T) {
	needRoot(t, "")
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=40m,mode=0700"); err != nil {
		if os.Getenv("KEYWARD_REQUIRE_INTEGRATION") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Error(err)
		}
	})
	dir := filepath.Join(mnt, "store")
	lines := run(t, "fill", dir, 2000)
	acked, failed := -1, ""
	for _, line := range lines {
		if _, err := fmt.Sscanf(line, "ack 0 %d", &acked); err != nil && strings.HasPrefix(line, "failed:") {
			failed = line
		}
	}
	if acked < 10 || !strings.Contains(failed, "no space left") {
		t.Fatalf("%d acknowledged, then %q", acked, failed)
	}
	// A start on the full disk is refused in clear text, or finds just enough.
	again := run(t, "look", dir, 0)
	if strings.HasPrefix(again[0], "refused") && !strings.Contains(again[0], "no space left") {
		t.Errorf("start on a full disk: %q", again[0])
	}
	if err := unix.Mount("tmpfs", mnt, "tmpfs", unix.MS_REMOUNT, "size=200m"); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	defer closeStore(t, s)
	n := 0
	if _, err := s.Load(t.Context(), func(r kms.Record) error {
		if strings.HasPrefix(r.Path, "f/") {
			n++
		}
		return nil
	}); err != nil || n < acked+1 || n > acked+2 {
		t.Errorf("%d records (%v), want %d or one more", n, err, acked+1)
	}
}
