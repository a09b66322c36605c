package mariadb_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
)

// harness runs build/harness, the plugin's code under ASan and UBSan with a
// C program in the server's place.
func harness(t *testing.T, args ...string) {
	t.Helper()
	if _, err := template(); err != nil {
		t.Skip(err)
	}
	if _, err := mariadbtest.BuildPlugin(t.Context(), ".", "asan"); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "build/harness", args...)
	cmd.Env = append(os.Environ(), "ASAN_OPTIONS=abort_on_error=0:detect_leaks=1", "UBSAN_OPTIONS=print_stacktrace=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("harness %s: %v\n%s", args[0], err, out)
	}
	t.Log(strings.TrimSpace(string(out)))
}

// TestCryptIsTheServers compares every mode, key length and split with the
// server's own my_aes_*.
func TestCryptIsTheServers(t *testing.T) { harness(t, "crypt") }

// TestFrames feeds mutated frames to the parsers. KEYWARD_FUZZ_FRAMES sets how
// many.
func TestFrames(t *testing.T) {
	count := os.Getenv("KEYWARD_FUZZ_FRAMES")
	if count == "" {
		count = "300000"
	}
	for seed := range 4 {
		harness(t, "frames", strconv.Itoa(seed*977+1), count)
	}
}

// TestGoldenFrames: the bytes that connector/PROTOCOL.md fixes.
func TestGoldenFrames(t *testing.T) { harness(t, "golden", "../../connector/testdata/frames.txt") }

// TestSession lives many lives with an agent that mutates its answers, leaves
// them out, and is right often enough that some lives begin.
func TestSession(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			a := newAgent(t, newDir(t))
			random := rand.New(rand.NewPCG(seed, 4711)) // used under the agent's lock
			a.SetFault(func(mariadbtest.Request) mariadbtest.Fault {
				switch random.IntN(40) {
				case 0:
					return mariadbtest.Fault{Close: true}
				case 1:
					return mariadbtest.Fault{Class: uint16(random.IntN(8)), Text: strings.Repeat("x\n", random.IntN(2000))}
				case 2:
					return mariadbtest.Fault{Hang: true}
				case 3, 4, 5:
					n := random.Uint64()
					return mariadbtest.Fault{Mutate: func(b []byte) []byte { return mutate(b, n) }}
				}
				return mariadbtest.Fault{}
			})
			harness(t, "session", a.Path(), "60")
		})
	}
}

// TestThreads lives lives under ThreadSanitizer with an agent that rolls,
// denies and breaks off all the time.
func TestThreads(t *testing.T) {
	t.Parallel()
	if _, err := template(); err != nil {
		t.Skip(err)
	}
	if _, err := mariadbtest.BuildPlugin(t.Context(), ".", "tsan"); err != nil {
		t.Fatal(err)
	}
	a := newAgent(t, newDir(t))
	lists := 0 // used under the agent's lock
	a.SetFault(func(q mariadbtest.Request) mariadbtest.Fault {
		if q.Op == mariadbtest.OpList {
			lists++
		}
		return mariadbtest.Fault{Close: q.Op == mariadbtest.OpList && lists%20 == 0}
	})
	cmd := exec.CommandContext(t.Context(), "build/harness-tsan", "session", a.Path(), "60")
	// it does not know pthread_mutex_clocklock
	cmd.Env = append(os.Environ(), "TSAN_OPTIONS=report_mutex_bugs=0")
	ended := make(chan struct{})
	go func() {
		tick := time.NewTicker(3 * time.Millisecond)
		defer tick.Stop()
		for state := byte(mariadbtest.StateActive); ; state ^= mariadbtest.StateActive ^ mariadbtest.StateDenied {
			a.Roll(1)
			a.SetState(2, state)
			select {
			case <-ended:
				return
			case <-tick.C:
			}
		}
	}()
	out, err := cmd.CombinedOutput()
	close(ended)
	if err != nil {
		t.Fatalf("harness: %v\n%s", err, out)
	}
	t.Log(strings.TrimSpace(string(out)))
}

// mutate changes a frame in one to three places, or its length.
func mutate(b []byte, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, seed))
	for range 1 + r.IntN(3) {
		switch r.IntN(4) {
		case 0:
			b = b[:r.IntN(len(b)+1)]
		case 1:
			b = append(b, byte(r.Uint32()))
		default:
			if len(b) > 0 {
				b[r.IntN(len(b))] ^= 1 << r.IntN(8)
			}
		}
		if len(b) == 0 {
			return []byte{0}
		}
	}
	return b
}

// TestAddressSanitizer runs the instrumented plugin in the real server through
// rolls, faults, denial and shutdown.
func TestAddressSanitizer(t *testing.T) {
	t.Parallel()
	r, c := prepared(t)
	plugin, err := mariadbtest.BuildPlugin(t.Context(), ".", "asan")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "cc", "-print-file-name=libasan.so").Output()
	if err != nil {
		t.Fatal(err)
	}
	reports := filepath.Join(r.dir, "asan")
	c.Plugins = []string{plugin}
	// the server itself is not instrumented: its leaks at exit are its own
	c.Env = []string{"LD_PRELOAD=" + strings.TrimSpace(string(out)),
		"ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:log_path=" + reports, "UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=" + reports}
	if err := r.tryStart(c); err != nil {
		t.Fatal(err)
	}
	r.fill("t1", "")
	r.fill("t7", "ENCRYPTION_KEY_ID=7")
	r.agent.Roll(1)
	for i, name := range []string{"hang", "garbage", "denied"} {
		r.agent.SetFault(func(mariadbtest.Request) mariadbtest.Fault { return faults[name] })
		for _, o := range operations {
			r.session(o.sql(i)...)
		}
	}
	r.agent.SetFault(nil)
	eventually(t, "roll", 10*time.Second, func() bool { return r.key(1, "LATEST_VERSION") == "3" })
	r.session("SELECT * FROM information_schema.KEYWARD_KEYS")
	r.exec("FLUSH KEYWARD_KEYS", "SET GLOBAL keyward_refresh = 1")
	r.status("Keyward_last_error")
	r.checkTable("t7")
	r.stopClean()
	found, err := filepath.Glob(reports + "*")
	if err != nil || len(found) > 0 {
		b, _ := os.ReadFile(found[0])
		t.Errorf("%d reports, the first:\n%s", len(found), b)
	}
}

// TestKeysAreLocked looks through a running server's memory for a key that the
// plugin holds and no table uses: it is there once, in memory that neither a
// core dump nor the swap nor a child gets.
func TestKeysAreLocked(t *testing.T) {
	r := newRig(t)
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", r.PID()))
	if err != nil {
		t.Skip(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", r.PID()))
	if err != nil {
		t.Skip(err)
	}
	defer mem.Close()
	key := r.agent.Key(7, 1) // of no table: only the plugin has it
	places := 0
	for _, area := range areas(t, maps) {
		b := make([]byte, area.end-area.begin)
		n, _ := mem.ReadAt(b, int64(area.begin))
		if !bytes.Contains(b[:n], key) {
			continue
		}
		places++
		for _, flag := range []string{"lo", "dd", "wf"} { // locked, not dumped, wiped on fork
			if !strings.Contains(area.flags, " "+flag) {
				t.Errorf("a key lies at %x in memory without %q:%s", area.begin, flag, area.flags)
			}
		}
	}
	if places != 1 {
		t.Errorf("the key is in %d places, want 1", places)
	}
}

type area struct {
	begin, end uint64
	flags      string
}

// areas are the writable private memory areas of an smaps file.
func areas(t *testing.T, smaps []byte) (out []area) {
	t.Helper()
	var a area
	for line := range strings.Lines(string(smaps)) {
		var begin, end uint64
		var perms string
		if n, _ := fmt.Sscanf(line, "%x-%x %s", &begin, &end, &perms); n == 3 {
			a = area{begin: begin, end: end}
			if perms != "rw-p" || end-begin > 1<<28 {
				a.end = begin
			}
		} else if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok && a.end > a.begin {
			a.flags = flags
			out = append(out, a)
		}
	}
	return out
}

// TestPageCrypt runs the comparison of speeds once; how fast it must be is the
// benchmarks' business.
func TestPageCrypt(t *testing.T) {
	if _, err := template(); err != nil {
		t.Skip(err)
	}
	all, err := mariadbtest.ComparePageCrypt(t.Context(), ".", 2, 500)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 8 {
		t.Errorf("%d results, want 8", len(all))
	}
	for _, p := range all {
		t.Logf("%+v", p)
	}
}
