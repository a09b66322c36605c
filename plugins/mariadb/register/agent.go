package register

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/keyward/keyward/dek"
)

// A StartMode says how the agent is started.
type StartMode string

// The ways to start an agent.
const (
	StartAuto    StartMode = "auto"    // systemd where it runs this host, else spawn
	StartSystemd StartMode = "systemd" // enable and restart the unit, written if there is none
	StartSpawn   StartMode = "spawn"   // a detached process with a pid file
	StartNone    StartMode = "none"    // somebody else does
)

// agentPatience bounds the wait for the agent's socket. It asks the key
// service for nothing before that.
const agentPatience = 20 * time.Second

// socketPoll is the pause between two looks for the agent's socket.
const socketPoll = 50 * time.Millisecond

// A runner starts and finds the agent.
type runner struct {
	mode    StartMode
	program string // keyward-agent
	config  string
	state   string // holds agent.pid and agent.log of a spawned agent
	socket  string
	units   string // directory for a systemd unit
}

// ParseStartMode reads the flag's text. dek.ErrInvalid: none of the modes.
func ParseStartMode(s string) (StartMode, error) {
	switch m := StartMode(s); m {
	case StartAuto, StartSystemd, StartSpawn, StartNone:
		return m, nil
	}
	return "", fmt.Errorf("%w: start mode %q: want auto, systemd, spawn or none", dek.ErrInvalid, s)
}

// start brings the agent up with its present configuration and waits for its
// socket; changed says that the configuration is newer than a running agent.
func (r runner) start(ctx context.Context, changed bool) (made bool, detail string, err error) {
	ctx, cancel := context.WithTimeout(ctx, agentPatience)
	defer cancel()
	mode := r.mode
	if mode == StartAuto {
		mode = StartSpawn
		if _, err := os.Stat("/run/systemd/system"); err == nil {
			mode = StartSystemd
		}
	}
	switch mode {
	case StartSystemd:
		return r.startUnit(ctx, changed)
	case StartSpawn:
		return r.spawn(ctx, changed)
	}
	return false, "somebody else starts it", r.await(ctx, nil)
}

// spawn starts a detached agent, or leaves the one of the pid file alone.
func (r runner) spawn(ctx context.Context, changed bool) (made bool, detail string, err error) {
	if pid := r.running(); pid != 0 {
		if !changed {
			return false, fmt.Sprintf("runs already, pid %d", pid), r.await(ctx, nil)
		}
		if err := r.stop(ctx, pid); err != nil {
			return false, "", err
		}
	}
	logPath := filepath.Join(r.state, "agent.log")
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return false, "", err
	}
	defer log.Close()
	begin, err := log.Seek(0, 2)
	if err != nil {
		return false, "", err
	}
	cmd := exec.Command(r.program, "--config", r.config)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it outlives this terminal
	if err := cmd.Start(); err != nil {
		return false, "", fmt.Errorf("%w: start %s: %w", dek.ErrPrecondition, r.program, err)
	}
	if _, err := writeFile(r.pidFile(), []byte(strconv.Itoa(cmd.Process.Pid)+"\n"), 0o644); err != nil {
		return false, "", errors.Join(err, cmd.Process.Kill())
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the agent or with this program
	if err := r.await(ctx, ended); err != nil {
		return false, "", fmt.Errorf("%w%s", err, lastLine(logPath, begin))
	}
	return true, fmt.Sprintf("started, pid %d, log %s; nobody starts it again at boot", cmd.Process.Pid, logPath), nil
}

func (r runner) pidFile() string { return filepath.Join(r.state, "agent.pid") }

// running returns the pid of a live agent of this configuration, 0 if none:
// a pid file alone proves nothing, the number may belong to another process.
func (r runner) running() int {
	b, err := os.ReadFile(r.pidFile())
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return 0
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !bytes.Contains(line, []byte("--config\x00"+r.config+"\x00")) {
		return 0
	}
	return pid
}

// stop ends the agent and waits until it is gone.
func (r runner) stop(ctx context.Context, pid int) error {
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return err
	}
	return poll(ctx, func() (bool, error) { return r.running() == 0, nil })
}

// await waits until the agent answers on its socket or has ended.
func (r runner) await(ctx context.Context, ended <-chan error) error {
	err := poll(ctx, func() (bool, error) {
		select {
		case err := <-ended:
			return false, fmt.Errorf("%w: the agent ended at once (%v)", dek.ErrPrecondition, err)
		default:
		}
		c, err := (&net.Dialer{}).DialContext(ctx, "unix", r.socket)
		if err != nil {
			return false, nil
		}
		return true, c.Close()
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: no agent answers on %s", dek.ErrUnavailable, r.socket)
	}
	return err
}

// poll asks done again and again until it says so, fails or ctx ends.
func poll(ctx context.Context, done func() (bool, error)) error {
	t := time.NewTicker(socketPoll)
	defer t.Stop()
	for {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

// lastLine returns what a log says last since begin, for an error message.
func lastLine(path string, begin int64) string {
	b, err := os.ReadFile(path)
	if err != nil || int64(len(b)) <= begin {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(b[begin:])), "\n")
	return "; its log says: " + lines[len(lines)-1]
}

// findProgram looks for the agent beside this program, then in PATH.
func findProgram(name string) (string, error) {
	if self, err := os.Executable(); err == nil {
		p := filepath.Join(filepath.Dir(self), name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o111 != 0 {
			return p, nil
		}
	}
	p, err := exec.LookPath(name)
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w: no program %s beside this one or in PATH", dek.ErrPrecondition, name)
	}
	return p, err
}
