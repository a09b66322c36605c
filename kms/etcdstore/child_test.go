package etcdstore_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/etcdstore"
)

// The test binary runs itself as a process that may be killed: the variable
// names the part to play and the directory.
const (
	playEnv = "KEYWARD_ETCDSTORE_PLAY"
	dirEnv  = "KEYWARD_ETCDSTORE_DIR"
	nEnv    = "KEYWARD_ETCDSTORE_N"
)

func TestMain(m *testing.M) {
	plays := map[string]func(*etcdstore.Store, int) error{
		"write": playWrite, "look": playLook, "churn": playChurn, "fill": playFill,
	}
	play, ok := plays[os.Getenv(playEnv)]
	if !ok {
		os.Exit(m.Run())
	}
	n, _ := strconv.Atoi(os.Getenv(nEnv))
	start := time.Now()
	s, err := etcdstore.Open(context.Background(), etcdstore.Config{Dir: os.Getenv(dirEnv), ReadyTimeout: 10 * time.Second, QuotaBytes: 64 << 20})
	if err != nil {
		fmt.Println("refused:", err)
		os.Exit(0)
	}
	fmt.Println("opened", time.Since(start).Microseconds(), memory("VmRSS:"))
	if err := play(s, n); err != nil {
		fmt.Println("failed:", err)
	}
	fmt.Println("memory", memory("VmRSS:"), memory("RssAnon:"), memory("VmHWM:"))
	if err := s.Close(); err != nil {
		fmt.Println("close:", err)
	}
}

// memory reads a line of /proc/self/status, in kB.
func memory(field string) int {
	b, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field); ok {
			n, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
			return n
		}
	}
	return 0
}

// child starts the test binary in a part. Its output ends at the pipe.
func child(t *testing.T, play, dir string, n int) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), playEnv+"="+play, dirEnv+"="+dir, nEnv+"="+strconv.Itoa(n))
	cmd.Stderr = t.Output()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewReader(out)
}

// value makes the i-th value of writer w: it can be told from any other.
func value(w, i int) []byte {
	return fmt.Appendf(nil, "%d %d %s", w, i, bytes.Repeat([]byte{byte('a' + i%26)}, 700))
}

const writers = 4

// playWrite lets each writer replace its record for ever, and says what was
// acknowledged.
func playWrite(s *etcdstore.Store, _ int) error {
	revs := [writers]int64{}
	from := [writers]int{}
	if _, err := s.Load(context.Background(), func(r kms.Record) error {
		var w, i int
		if _, err := fmt.Sscanf(string(r.Value), "%d %d", &w, &i); err != nil {
			return err
		}
		revs[w], from[w] = r.Revision, i+1
		return nil
	}); err != nil {
		return err
	}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rev := revs[w]
			for i := from[w]; ; i++ {
				r, err := s.Commit(context.Background(), []kms.Change{{Path: strconv.Itoa(w), Value: value(w, i), Expect: rev}})
				if err != nil {
					fmt.Println("failed:", err)
					return
				}
				rev = r
				fmt.Println("ack", w, i)
			}
		})
	}
	wg.Wait()
	return nil
}

// playLook reads everything and writes once.
func playLook(s *etcdstore.Store, _ int) error {
	n := 0
	if _, err := s.Load(context.Background(), func(kms.Record) error { n++; return nil }); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err := s.Commit(ctx, []kms.Change{{Path: "look", Value: []byte("x")}})
	fmt.Println("records", n)
	return err
}

// playChurn makes n changes of state in a thousand records, 64 at a time.
func playChurn(s *etcdstore.Store, n int) error {
	const callers = 64
	var wg sync.WaitGroup
	start := time.Now()
	for c := range callers {
		wg.Go(func() {
			revs := map[string]int64{}
			for i := range n / callers {
				p := fmt.Sprintf("r/%02d/%02d", c, i%16)
				r, err := s.Commit(context.Background(), []kms.Change{{Path: p, Value: sealed(700), Expect: revs[p]}})
				if err != nil {
					fmt.Println("failed:", err)
					return
				}
				revs[p] = r
			}
		})
	}
	wg.Wait()
	fmt.Println("rate", int(float64(n)/time.Since(start).Seconds()))
	return nil
}

// playFill writes new records until it can't.
func playFill(s *etcdstore.Store, n int) error {
	for i := range n {
		if _, err := s.Commit(context.Background(), []kms.Change{{Path: fmt.Sprintf("f/%06d", i), Value: sealed(64 << 10)}}); err != nil {
			return err
		}
		fmt.Println("ack", 0, i)
	}
	return nil
}

// run runs a part to its end and returns its lines.
func run(t *testing.T, play, dir string, n int) []string {
	t.Helper()
	cmd, out := child(t, play, dir, n)
	b, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s: %v after\n%s", play, err, b)
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

// TestKill kills a writing process again and again: nothing acknowledged may
// be missing, and nothing may be there that was never written.
func TestKill(t *testing.T) {
	dir := newDir(t)
	acked := [writers]int{-1, -1, -1, -1}
	total := 0
	for round := range 12 {
		cmd, out := child(t, "write", dir, 0)
		stop := 30 + 67*round%400
		for n := 0; n < stop; {
			line, err := out.ReadString('\n')
			if err != nil {
				t.Fatalf("round %d: the child ended: %q %v", round, line, err)
			}
			n += note(line, &acked)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		rest, _ := io.ReadAll(out) // acknowledged before the kill; a torn last line is none
		for line := range strings.Lines(string(rest)) {
			note(line, &acked)
		}
		_ = cmd.Wait() // killed
		total += stop
		checkAcked(t, dir, acked)
	}
	t.Logf("%d kills, at least %d acknowledged changes", 12, total)
}

func note(line string, acked *[writers]int) int {
	var w, i int
	if n, _ := fmt.Sscanf(line, "ack %d %d\n", &w, &i); n != 2 || !strings.HasSuffix(line, "\n") {
		return 0
	}
	acked[w] = max(acked[w], i)
	return 1
}

func checkAcked(t *testing.T, dir string, acked [writers]int) {
	t.Helper()
	s := open(t, dir)
	defer closeStore(t, s)
	got := [writers]int{-1, -1, -1, -1}
	if _, err := s.Load(t.Context(), func(r kms.Record) error {
		var w, i int
		if _, err := fmt.Sscanf(string(r.Value), "%d %d", &w, &i); err != nil || !bytes.Equal(r.Value, value(w, i)) {
			t.Errorf("record %q has a value nobody wrote", r.Path)
			return nil
		}
		got[w] = i
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for w := range writers {
		if got[w] < acked[w] || got[w] > acked[w]+1 {
			t.Errorf("writer %d: stored %d, acknowledged %d", w, got[w], acked[w])
		}
	}
}

// TestManyChanges measures the start after 100,000 changes of state and a kill.
func TestManyChanges(t *testing.T) {
	if testing.Short() || raceDetector {
		t.Skip("measures time and memory of 100,000 changes")
	}
	dir := newDir(t)
	cmd, out := child(t, "churn", dir, 100_000)
	for {
		line, err := out.ReadString('\n')
		if err != nil {
			t.Fatalf("the child ended: %v", err)
		}
		t.Log("churn: ", strings.TrimSpace(line))
		if strings.HasPrefix(line, "memory") {
			break
		}
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // killed, or just ended
	for range 3 {
		lines := run(t, "look", dir, 0)
		t.Log("reopen:", strings.Join(lines, "; "))
		var micros, kb int
		if _, err := fmt.Sscanf(lines[0], "opened %d %d", &micros, &kb); err != nil {
			t.Fatal(err)
		}
		if limit := 300 * time.Millisecond; time.Duration(micros)*time.Microsecond > limit {
			t.Errorf("opened in %d us, want at most %v", micros, limit)
		}
		if kb > 80<<10 {
			t.Errorf("%d kB resident, want at most 80 MB", kb)
		}
	}
	entries, _ := filepath.Glob(filepath.Join(dir, "member", "*", "*"))
	for _, e := range entries {
		if st, err := os.Stat(e); err == nil {
			t.Logf("%s: %d bytes", filepath.Base(e), st.Size())
		}
	}
}
