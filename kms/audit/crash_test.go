package audit_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
)

// The test binary runs itself as a process that may be killed or traced.
const (
	playEnv = "KEYWARD_AUDIT_PLAY"
	dirEnv  = "KEYWARD_AUDIT_DIR"
	keyEnv  = "KEYWARD_AUDIT_TESTKEY" // of this test run only
)

func TestMain(m *testing.M) {
	play := map[string]func(*audit.Log) error{"append": playAppend, "few": playFew, "slow": playSlow}[os.Getenv(playEnv)]
	if play == nil {
		os.Exit(m.Run())
	}
	if err := runPlay(play); err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
}

func runPlay(play func(*audit.Log) error) error {
	der, err := hex.DecodeString(os.Getenv(keyEnv))
	if err != nil {
		return err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return err
	}
	cfg := audit.Config{
		Dir: os.Getenv(dirEnv), Signer: key.(*ecdsa.PrivateKey), SegmentBytes: 256 << 10,
		CheckpointEvery: 20 * time.Millisecond, RetryEvery: 20 * time.Millisecond,
	}
	if os.Getenv(playEnv) == "slow" {
		cfg.Deadline = 200 * time.Millisecond
	}
	l, err := audit.Open(context.Background(), cfg)
	if err != nil {
		return err
	}
	if err := play(l); err != nil {
		return err
	}
	return l.Close()
}

// playAppend appends pairs for ever and says what was acknowledged.
func playAppend(l *audit.Log) error {
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				seq, err := l.Append(context.Background(), event(w*1000000+i, kms.PhaseIntent))
				fmt.Println("ack", seq, err)
				e := event(w*1000000+i, kms.PhaseOutcome)
				e.Intent = seq
				seq, err = l.Append(context.Background(), e)
				fmt.Println("ack", seq, err)
			}
		})
	}
	wg.Wait()
	return nil
}

// playFew appends one after the other, each between two marks that a trace
// shows (writes to standard output), whether or not it succeeds.
func playFew(l *audit.Log) error {
	for i := range 40 {
		_ = appendMarked(l, i)
	}
	return nil
}

// playSlow appends until one failed and ten after it succeeded.
func playSlow(l *audit.Log) error {
	failed := false
	for i, good := 0, 0; good < 10 && i < 1000; i++ {
		switch err := appendMarked(l, i); {
		case err != nil:
			failed = true
		case failed:
			good++
		}
	}
	return nil
}

func appendMarked(l *audit.Log, i int) error {
	fmt.Printf("begin %d\n", i)
	seq, err := l.Append(context.Background(), event(i, kms.PhaseRefused))
	fmt.Printf("end %d %d %v\n", i, seq, err)
	if err != nil {
		time.Sleep(30 * time.Millisecond) // another process: give it time to recover
	}
	return err
}

func childEnv(t *testing.T, play, dir string) []string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(testKey())
	if err != nil {
		t.Fatal(err)
	}
	return append(os.Environ(), playEnv+"="+play, dirEnv+"="+dir, keyEnv+"="+hex.EncodeToString(der))
}

// TestKill kills a process that appends: every acknowledged record is there,
// every intent has an outcome afterwards, and the log verifies.
func TestKill(t *testing.T) {
	dir := newDir(t)
	acked := map[uint64]bool{}
	orphans := 0
	for round := range 15 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env, cmd.Stderr = childEnv(t, "append", dir), t.Output()
		pipe, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		out := bufio.NewReader(pipe)
		for n := 0; n < 100+211*round%900; n++ {
			line, err := out.ReadString('\n')
			if err != nil {
				t.Fatalf("round %d: the child ended: %q %v", round, line, err)
			}
			ack(t, line, acked)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		rest, _ := io.ReadAll(out)
		for line := range strings.Lines(string(rest)) {
			ack(t, line, acked)
		}
		_ = cmd.Wait() // killed
		l := open(t, testConfig(t, dir))
		orphans += len(l.Recovery().Orphans)
		closeLog(t, l)
	}
	mustVerify(t, dir)
	opened := map[uint64]bool{}
	for rec, err := range audit.Read(t.Context(), os.DirFS(dir), audit.Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		delete(acked, rec.Seq)
		if rec.Event.Phase == kms.PhaseIntent {
			opened[rec.Seq] = true
		}
		delete(opened, rec.Event.Intent)
	}
	if len(acked) > 0 || len(opened) > 0 {
		t.Errorf("%d acknowledged records are missing, %d intents have no outcome", len(acked), len(opened))
	}
	t.Logf("%d intents were closed after kills", orphans)
}

func ack(t *testing.T, line string, acked map[uint64]bool) {
	t.Helper()
	var seq uint64
	if n, _ := fmt.Sscanf(line, "ack %d <nil>\n", &seq); n == 1 && strings.HasSuffix(line, "\n") {
		if acked[seq] {
			t.Errorf("sequence %d was given twice", seq)
		}
		acked[seq] = true
	}
}

// integration skips without tool, or fails where every integration must run.
func integration(t *testing.T, tool string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		if os.Getenv("KEYWARD_REQUIRE_INTEGRATION") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// strace runs a part under strace and returns its trace and output. ok is
// false if tracing is not allowed here.
func strace(t *testing.T, play, dir string, args ...string) (trace, out string) {
	t.Helper()
	integration(t, "strace")
	file := filepath.Join(t.TempDir(), "trace")
	cmd := exec.CommandContext(t.Context(), "strace", append(append([]string{"-f", "-y", "-o", file}, args...), os.Args[0])...)
	cmd.Env = childEnv(t, play, dir)
	b, err := cmd.CombinedOutput()
	if strings.Contains(string(b), "ptrace") && os.Getenv("KEYWARD_REQUIRE_INTEGRATION") != "1" {
		t.Skipf("strace: %s", b)
	}
	// strace counts by thread, so that an injected fault may also hit what Close
	// writes, and Close has to say so.
	if err != nil && !regexp.MustCompile(`(?m)^failed: .*(input/output error|no space left on device)$`).Match(b) {
		t.Fatalf("strace: %v\n%s", err, b)
	}
	return string(read(t, file)), string(b)
}

// TestDurableBeforeReply looks at the order of the kernel's calls: between the
// mark before an append and the mark after it, the record is written to the
// segment and then a fdatasync of the segment has returned zero.
func TestDurableBeforeReply(t *testing.T) {
	trace, out := strace(t, "few", newDir(t), "-s", "200", "-e", "trace=write,pwrite64,fdatasync")
	if n := strings.Count(out, "<nil>"); n != 40 {
		t.Fatalf("%d appends succeeded, want 40:\n%s", n, out)
	}
	mark := regexp.MustCompile(`write\(1<[^>]*>, "(begin|end) (\d+)`)
	synced := regexp.MustCompile(`fdatasync\(\d+<[^>]*\.log>\) += 0$`)
	started := regexp.MustCompile(`^(\d+) +fdatasync\(\d+<[^>]*\.log> <unfinished`)
	resumed := regexp.MustCompile(`^(\d+) +<\.\.\. fdatasync resumed>\) += 0$`)
	state, at, pairs := "", "", 0
	waiting := map[string]bool{}
	for line := range strings.Lines(trace) {
		line = strings.TrimSuffix(line, "\n")
		if m := mark.FindStringSubmatch(line); m != nil && m[1] == "begin" {
			state, at = "begun", m[2]
		} else if m != nil {
			if state != "synced" || at != m[2] {
				t.Errorf("append %s returned when its record was %s", m[2], state)
			}
			pairs++
		}
		if strings.Contains(line, ".log>") && strings.Contains(line, fmt.Sprintf(`c0ffee%08s`, at)) && state == "begun" {
			state = "written"
		}
		if m := started.FindStringSubmatch(line); m != nil {
			waiting[m[1]] = state == "written"
		}
		if m := resumed.FindStringSubmatch(line); m != nil && waiting[m[1]] && state == "written" || synced.MatchString(line) && state == "written" {
			state = "synced"
		}
	}
	if pairs != 40 {
		t.Errorf("%d appends in the trace, want 40", pairs)
	}
}

// TestSickDisk lets single system calls on the segment fail: the append gets an
// error, and nothing that was acknowledged is missing afterwards.
func TestSickDisk(t *testing.T) {
	for _, c := range []struct {
		call, errno string
		from        int // past what Open does
	}{
		{"fdatasync", "EIO", 6}, {"pwrite64", "EIO", 24}, {"pwrite64", "ENOSPC", 25},
	} {
		for when := c.from; when < c.from+39; when += 13 { // 40 appends: not yet Close
			t.Run(fmt.Sprintf("%s %s %d", c.call, c.errno, when), func(t *testing.T) {
				dir := newDir(t)
				_, out := strace(t, "few", dir, "-e", "trace="+c.call, "-e", fmt.Sprintf("inject=%s:error=%s:when=%d", c.call, c.errno, when))
				acked, failed := map[uint64]bool{}, 0
				for _, m := range regexp.MustCompile(`(?m)^end \d+ (\d+) (.*)$`).FindAllStringSubmatch(out, -1) {
					seq, _ := strconv.ParseUint(m[1], 10, 64)
					if m[2] == "<nil>" {
						acked[seq] = true
					} else {
						failed++
					}
				}
				if len(acked)+failed != 40 || len(acked) < 20 {
					t.Fatalf("%d acknowledged, %d failed:\n%s", len(acked), failed, out)
				}
				mustVerify(t, dir)
				for rec, err := range audit.Read(t.Context(), os.DirFS(dir), audit.Filter{}) {
					if err != nil {
						t.Fatal(err)
					}
					delete(acked, rec.Seq)
				}
				if len(acked) > 0 {
					t.Errorf("acknowledged records are missing: %v", acked)
				}
				t.Logf("%d appends failed", failed)
			})
		}
	}
}

// TestSlowDisk lets an fdatasync hang for 0.6 s (strace counts by thread, so it
// may happen more than once): the append it holds fails at the deadline, those
// that follow fail at once, the log goes on when the disk answers, and what was
// on its way when it was answered with an error is written all the same.
func TestSlowDisk(t *testing.T) {
	dir := newDir(t)
	_, out := strace(t, "slow", dir, "-e", "trace=fdatasync", "-e", "inject=fdatasync:delay_enter=600000:when=12")
	written, failed, after := uint64(1), 0, 0 // the log's own first record
	for _, m := range regexp.MustCompile(`(?m)^end (\d+) (\d+) (.*)$`).FindAllStringSubmatch(out, -1) {
		if m[3] == "<nil>" {
			written++
			if failed > 0 {
				after++
			}
			continue
		}
		failed++
		if m[2] != "0" {
			written++
		}
		if !strings.Contains(m[3], "has not answered") {
			t.Errorf("append %s: %s", m[1], m[3])
		}
	}
	if failed < 2 || after != 10 {
		t.Fatalf("%d appends failed, %d succeeded after them:\n%s", failed, after, out)
	}
	if r := mustVerify(t, dir); r.Last != written {
		t.Errorf("%d records, want %d", r.Last, written)
	}
}

// smallDisk mounts a file system of 3 MB.
func smallDisk(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=3m,mode=0700"); err != nil {
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
	return mnt
}

// TestDiskFull fills a small file system: appends are refused with
// dek.ErrExhausted, the log says so in a record, goes on by itself when there is
// room, and has lost nothing.
func TestDiskFull(t *testing.T) {
	mnt := smallDisk(t)
	cfg := testConfig(t, filepath.Join(mnt, "audit"))
	cfg.CheckpointEvery = time.Second
	l := open(t, cfg)
	var last uint64
	for {
		seq, err := l.Append(t.Context(), event(int(last), kms.PhaseRefused))
		if err != nil {
			if !errors.Is(err, dek.ErrExhausted) {
				t.Fatalf("got %v, want ErrExhausted", err)
			}
			break
		}
		last = seq
	}
	start := time.Now()
	if _, err := l.Append(t.Context(), event(1, kms.PhaseRefused)); !errors.Is(err, dek.ErrExhausted) || time.Since(start) > 2*time.Second {
		t.Errorf("refused with %v after %v", err, time.Since(start))
	}
	if err := l.Health(t.Context()); !errors.Is(err, dek.ErrExhausted) {
		t.Errorf("health: got %v, want ErrExhausted", err)
	}
	if err := unix.Mount("tmpfs", mnt, "tmpfs", unix.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatal(err)
	}
	start = time.Now()
	for l.Health(t.Context()) != nil {
		if time.Since(start) > 5*time.Second {
			t.Fatal("not recovered after 5 s")
		}
	}
	next := mustAppend(t, l, event(2, kms.PhaseRefused))
	closeLog(t, l)
	mustVerify(t, cfg.Dir)
	var ops []string
	for rec, err := range audit.Read(t.Context(), os.DirFS(cfg.Dir), audit.Filter{From: last + 1}) {
		if err != nil {
			t.Fatal(err)
		}
		ops = append(ops, string(rec.Event.Operation))
	}
	want := []string{"audit.full", "audit.resumed", "keyring.unwrap"}
	if fmt.Sprint(ops) != fmt.Sprint(want) || next != last+3 {
		t.Errorf("after record %d: %v (next %d), want %v", last, ops, next, want)
	}
}

// TestTornTail opens logs that end in the middle of a write.
func TestTornTail(t *testing.T) {
	base, _ := written(t, 10)
	last := mustVerify(t, base).Last
	line := audit.EncodeRecord(last+1, event(1, kms.PhaseRefused))
	for _, c := range []struct {
		name string
		tail string
		torn int64
		size uint64 // after Open, which records what it cut off
	}{
		{"clean", "", 0, last},
		{"whole record without checkpoint", string(line) + "\n", 0, last + 1},
		{"record without its end", string(line), int64(len(line)), last + 1},
		{"half a record", string(line[:40]), 40, last + 1},
		{"half a record and zeros", string(line[:40]) + strings.Repeat("\x00", 5000), 40, last + 1},
		{"zeros", strings.Repeat("\x00", 100000), 0, last},
		{"hole, then the end of a record", strings.Repeat("\x00", 4096) + string(line[40:]) + "\n", 4096 + int64(len(line)) - 39, last + 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := copyDir(t, base)
			segs := glob(t, dir, "*.log")
			name := segs[len(segs)-1]
			write(t, name, append(read(t, name), c.tail...))
			r := mustVerify(t, dir)
			if r.Torn != c.torn {
				t.Errorf("verify saw %d torn bytes, want %d", r.Torn, c.torn)
			}
			l := open(t, testConfig(t, dir))
			if got := l.Recovery().Torn; got != c.torn || l.Size() != c.size {
				t.Errorf("cut %d bytes, %d records; want %d and %d", got, l.Size(), c.torn, c.size)
			}
			act(t, l, 2)
			closeLog(t, l)
			mustVerify(t, dir)
		})
	}
}
