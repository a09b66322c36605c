package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A stage is the private world of one demonstration: a directory, the
// processes in it and the tally of checks.
type stage struct {
	dir string // everything lives below it
	bin string // the built programs
	so  string // directory of the built plugin

	user string // the account that runs all this, servers included
	out  io.Writer

	ok, failed int

	mu    sync.Mutex
	procs []*process // in order of start
}

// A process is one server of the demonstration, its log in a file.
type process struct {
	name string
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended
	err  error         // after done
}

func newStage(out io.Writer) (*stage, error) {
	self, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	me, err := user.Current()
	if err != nil {
		return nil, err
	}
	// The servers' Unix sockets must fit in 107 bytes, so the path is short.
	dir, err := os.MkdirTemp("/var/tmp", "keyward-demo-")
	if err != nil {
		return nil, err
	}
	// mariadbd may run as another user and must reach its own files in here.
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	return &stage{dir: dir, bin: filepath.Join(self, "bin"), so: filepath.Join(self, "plugins/mariadb/build"),
		user: me.Username, out: out}, nil
}

func (s *stage) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// say prints one line of evidence.
func (s *stage) say(format string, args ...any) {
	fmt.Fprintf(s.out, "  "+format+"\n", args...)
}

func (s *stage) title(n int, text string) {
	fmt.Fprintf(s.out, "\n== %d. %s\n", n, text)
}

// check prints the verdict on what must be true and counts it.
func (s *stage) check(what string, err error) {
	if err == nil {
		s.ok++
		fmt.Fprintf(s.out, "check: %s … ok\n", what)
		return
	}
	s.failed++
	fmt.Fprintf(s.out, "check: %s … FAILED\n", what)
	s.say("because: %v", err)
}

// run runs one of our commands and shows it as a person would type it.
func (s *stage) run(ctx context.Context, env []string, args ...string) (string, error) {
	s.say("$ %s", s.shorten(strings.Join(args, " ")))
	return s.quiet(ctx, env, args...)
}

// quiet is run without showing the command.
func (s *stage) quiet(ctx context.Context, env []string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.program(args[0]), args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", args[0], err, lastLines(errs.String()+out.String(), 4))
	}
	return out.String(), err
}

// show prints the first lines of an output, indented.
func (s *stage) show(text string, lines int) {
	for i, l := range strings.Split(strings.TrimRight(text, "\n"), "\n") {
		if i == lines {
			s.say("  …")
			return
		}
		s.say("  %s", s.shorten(l))
	}
}

// shorten replaces the stage's long paths, so that lines stay readable.
func (s *stage) shorten(text string) string {
	return strings.ReplaceAll(strings.ReplaceAll(text, s.bin+"/", ""), s.dir, "$DEMO")
}

func (s *stage) program(name string) string {
	if strings.HasPrefix(name, "keyward") {
		return filepath.Join(s.bin, name)
	}
	return name
}

// start starts a server; its output goes to NAME.log below the stage.
func (s *stage) start(name string, env []string, args ...string) (*process, error) {
	p := &process{name: name, log: s.path(name + ".log"), done: make(chan struct{})}
	f, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p.cmd = exec.Command(s.program(args[0]), args[1:]...)
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = f, f
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	s.mu.Lock()
	s.procs = append(s.procs, p)
	s.mu.Unlock()
	return p, nil
}

// stop ends p with sig and waits; SIGKILL goes to its whole group, so that
// nothing of it stays behind.
func (p *process) stop(sig syscall.Signal) {
	if p == nil || p.ended() {
		return
	}
	pid := p.cmd.Process.Pid
	if sig == syscall.SIGKILL {
		pid = -pid
	}
	_ = syscall.Kill(pid, sig)
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
	}
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// stopAll ends every server, the newest first.
func (s *stage) stopAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.procs) - 1; i >= 0; i-- {
		s.procs[i].stop(syscall.SIGTERM)
	}
}

// leftOver returns the processes, ours apart, whose arguments name the stage:
// nothing of a demonstration may go on after it.
func (s *stage) leftOver() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		args, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil {
			continue // it ended meanwhile
		}
		if bytes.Contains(args, []byte(s.dir)) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// await calls probe until it succeeds, p ends or the time is up.
func await(ctx context.Context, p *process, limit time.Duration, probe func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := probe()
		if err == nil {
			return nil
		}
		if p != nil && p.ended() {
			return fmt.Errorf("%s ended: %w: %s", p.name, errOr(p.err), tail(p.log, 6))
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %v: %w", limit, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func errOr(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// dials reports whether something answers on a Unix socket or TCP address.
func dials(network, addr string) func() error {
	return func() error {
		c, err := net.DialTimeout(network, addr, time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	}
}

// freePort returns a loopback port that nobody listens on just now.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func tail(name string, n int) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	return lastLines(string(b), n)
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, " | ")
}

// grepFile returns the newest line of a log after offset that holds all words.
func grepFile(name string, offset int64, words ...string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return "", err
	}
	found := ""
	for sc := bufio.NewScanner(f); sc.Scan(); {
		hit := true
		for _, w := range words {
			hit = hit && strings.Contains(sc.Text(), w)
		}
		if hit {
			found = sc.Text()
		}
	}
	if found == "" {
		return "", fmt.Errorf("no line with %q in %s: %s", words, filepath.Base(name), tail(name, 5))
	}
	return found, nil
}

// size returns a file's length, 0 if there is none.
func size(name string) int64 {
	if fi, err := os.Stat(name); err == nil {
		return fi.Size()
	}
	return 0
}

// search returns the files below dirs that hold any of the needles.
func search(needles [][]byte, dirs ...string) ([]string, int, error) {
	var hits []string
	files := 0
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(name string, e os.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			files++
			for _, n := range needles {
				if bytes.Contains(b, n) {
					hits = append(hits, name)
					break
				}
			}
			return nil
		})
		if err != nil {
			return nil, 0, err
		}
	}
	return hits, files, nil
}
