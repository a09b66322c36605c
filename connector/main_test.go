package connector_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
)

// A processConfig is what a test gives to an agent in a process of its own.
type processConfig struct {
	Socket, StateDir, HostSecretFile string
	Instances                        []connector.InstanceRule
	CallTimeout                      time.Duration
}

// agentEnv makes the test program an agent: its configuration, without logger.
const agentEnv = "KEYWARD_TEST_AGENT"

func TestMain(m *testing.M) {
	if cfg := os.Getenv(agentEnv); cfg != "" {
		os.Exit(runAgentProcess(cfg))
	}
	if question := os.Getenv(peerEnv); question != "" {
		os.Exit(runPeerProcess(question))
	}
	code := m.Run()
	if code == 0 {
		code = checkLeaks()
	}
	os.Exit(code)
}

// checkLeaks fails if a goroutine of ours is left after all tests.
func checkLeaks() int {
	var left string
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); runtime.Gosched() {
		buf := make([]byte, 1<<20)
		buf = buf[:runtime.Stack(buf, true)]
		left = ""
		for i, g := range strings.Split(string(buf), "\n\n") {
			if i > 0 && strings.Contains(g, "keyward/connector.") {
				left += g + "\n\n"
			}
		}
		if left == "" {
			return 0
		}
	}
	fmt.Fprintf(os.Stderr, "goroutines left:\n%s", left)
	return 1
}

func runAgentProcess(text string) int {
	debug.SetMemoryLimit(20 << 20) // as cmd/keyward-agent does
	var c processConfig
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		fmt.Println(err)
		return 2
	}
	a, err := connector.NewAgent(connector.AgentConfig{
		Socket: c.Socket, SocketGID: -1, StateDir: c.StateDir, HostSecretFile: c.HostSecretFile,
		Instances: c.Instances, CallTimeout: c.CallTimeout, Logger: quiet(),
	})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	fmt.Println("ready")
	if err := a.Run(ctx); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// binaryEnv names a keyward-agent that is measured in place of the test program.
const binaryEnv = "KEYWARD_AGENT_BINARY"

// startProcess runs the host's agent in a process of its own.
func (h *host) startProcess() *exec.Cmd {
	c := processConfig{h.cfg.Socket, h.cfg.StateDir, h.cfg.HostSecretFile, h.cfg.Instances, h.cfg.CallTimeout}
	cmd := exec.Command(os.Args[0]) //nolint:gosec // this program
	cmd.Env = append(os.Environ(), agentEnv+"="+string(must(json.Marshal(c))))
	cmd.Stderr = os.Stderr
	if binary := os.Getenv(binaryEnv); binary != "" {
		return h.startBinary(binary)
	}
	out := must(cmd.StdoutPipe())
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	line := must(bufio.NewReader(out).ReadString('\n'))
	if line != "ready\n" {
		h.t.Fatalf("agent process: %s", line)
	}
	return cmd
}

// startBinary runs the released program in place of the test program.
func (h *host) startBinary(path string) *exec.Cmd {
	f := connector.AgentFile{
		Socket: h.cfg.Socket, StateDir: h.cfg.StateDir, HostSecretFile: h.cfg.HostSecretFile,
		Instances: []connector.AgentInstance{{Name: "shop", Kind: "mariadb", User: strconv.Itoa(os.Getuid())}},
	}
	file := filepath.Join(h.t.TempDir(), "agent.json")
	if err := os.WriteFile(file, must(f.Encode()), 0o600); err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command(path, "--config", file) //nolint:gosec // the developer names it
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for { // until the socket answers; its own test ends this otherwise
		if c, err := net.Dial("unix", h.cfg.Socket); err == nil {
			_ = c.Close()
			return cmd
		}
		runtime.Gosched()
	}
}

// statusKiB reads a line of /proc/PID/status.
func statusKiB(t testing.TB, pid int, field string) int {
	b := must(os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)))
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			return must(strconv.Atoi(strings.Fields(rest)[0]))
		}
	}
	t.Fatalf("no %s", field)
	return 0
}

// agent/rss: 10,000 keys held, all asked for once.
func TestAgentMemory(t *testing.T) {
	if testing.Short() || raceDetector {
		t.Skip("makes 10,000 keys; sizes mean nothing under the race detector")
	}
	const keyrings, versions = 100, 100
	kms := newFakeKMS(t, newTestCA(t, "ca"))
	for r := range keyrings {
		for range versions {
			kms.addVersion(fmt.Sprintf("ring-%d", r), uint32(r+1))
		}
	}
	h := newHost(t, kms)
	h.cfg.CallTimeout = 30 * time.Second
	cmd := h.startProcess()
	var s *connector.Socket
	for s == nil { // a cold start gives up after 5 s, the keys it has got stay
		var err error
		if s, err = h.dial(connector.NewProcess("mariadb", "shop")); err != nil {
			t.Log(err)
		}
	}
	for r := range uint32(keyrings) {
		for v := range uint32(versions) {
			k, err := s.Get(testContext(t), connector.ServerKey{ID: r + 1, Version: 2*v + 1})
			if err != nil {
				t.Fatal(err)
			}
			k.Destroy()
		}
	}
	if n := kms.count("Unwrap"); n != 0 {
		t.Errorf("%d keys were not held", n)
	}
	rss, peak := statusKiB(t, cmd.Process.Pid, "VmRSS"), statusKiB(t, cmd.Process.Pid, "VmHWM")
	t.Logf("agent with %d keys: VmRSS %d KiB (anonymous %d, file %d), peak %d KiB", keyrings*versions, rss, statusKiB(t, cmd.Process.Pid, "RssAnon"), statusKiB(t, cmd.Process.Pid, "RssFile"), peak)
	limit := 30 << 10
	if os.Getenv(binaryEnv) == "" {
		limit += 5 << 10 // the test program's own text, with the service in it
	}
	if rss > limit {
		t.Errorf("VmRSS %d KiB, want at most %d", rss, limit)
	}
}

// Killed at any moment, the agent comes back with its state; a running
// database is let in without the key service.
func TestAgentKilled(t *testing.T) {
	kms, h := newShop(t)
	p := connector.NewProcess("mariadb", "shop")
	for round := range 10 {
		cmd := h.startProcess()
		s := h.mustDial(p)
		p.Cold = false
		getKey(t, s, 1, 3, "orders", 2)
		if round%2 == 1 { // while it writes its state
			kms.addVersion("temp", 2)
			kms.notify(2, "temp")
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if _, err := s.Get(testContext(t), connector.ServerKey{ID: 1, Version: 3}); err == nil {
			t.Error("the agent lives")
		}
	}
	kms.stop()
	h.startProcess()
	s := h.mustDial(p)
	if l := must(s.List(testContext(t))); len(l.Keyrings) != 2 || l.Keyrings[0].State != connector.ListStale {
		t.Errorf("got %+v", l)
	}
}
