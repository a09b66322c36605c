// Command demo shows Keyward's main job on one machine: a real MariaDB whose
// tables, redo log, temporary files, binlog and Aria tables are encrypted by
// keys rooted in a PKCS#11 token. `make demo` runs it; every claim is a line
// "check: … ok" or "check: … FAILED", and it exits 1 if any failed.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	fs := flag.NewFlagSet("demo", flag.ContinueOnError)
	fs.SetOutput(stderr)
	keep := fs.Bool("keep", false, "leave everything running and print how to look around")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	started := time.Now()
	s, err := newStage(stdout)
	if err != nil {
		fmt.Fprintln(stderr, "demo:", err)
		return 1
	}
	d := &demo{stage: s}
	d.play(ctx)
	if *keep {
		d.lookAround()
	} else {
		d.stopAll()
		d.check("nothing is left running", d.nothingLeft())
		d.check(fmt.Sprintf("all this took less than %v", limit), within(time.Since(started), limit))
		if s.failed == 0 {
			if err := os.RemoveAll(s.dir); err != nil {
				fmt.Fprintln(stderr, "demo:", err)
			}
		} else {
			fmt.Fprintf(stderr, "demo: the logs are in %s\n", s.dir)
		}
	}
	fmt.Fprintf(stdout, "\n  took %.0f s\n", time.Since(started).Seconds())
	fmt.Fprintf(stdout, "demo: %d ok, %d failed\n", s.ok, s.failed)
	if s.failed > 0 || s.ok == 0 {
		return 1
	}
	return 0
}

// limit is how long the whole show may take once everything is installed.
const limit = 120 * time.Second

func within(took, limit time.Duration) error {
	if took > limit {
		return fmt.Errorf("it took %v", took.Round(time.Second))
	}
	return nil
}

// nothingLeft kills what is still there and says so.
func (d *demo) nothingLeft() error {
	pids, err := d.leftOver()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	if len(pids) > 0 {
		return fmt.Errorf("processes %v were", pids)
	}
	return nil
}

// play runs the acts in order. An act that can't go on ends the show: what
// follows would prove nothing.
func (d *demo) play(ctx context.Context) {
	acts := []struct {
		title string
		act   func(context.Context) error
	}{
		{"the stage: a SoftHSM token, the key service, five recovery shares", d.setUp},
		{"two people: the officer prepares, the DBA registers", d.register},
		{"what a stolen disk shows", d.stolenRows},
		{"rolling: the keyring, then the master key", d.roll},
		{"kill -9 of the server, the agent and the key service during writes", d.killAll},
		{"the key service is down", d.outage},
		{"the data directory and the agent's state are copied away", d.stolenDisk},
		{"the officer disables the key", d.disable},
		{"disaster: token and key service destroyed", d.disaster},
		{"the record of it all", d.audit},
	}
	for i, a := range acts {
		d.title(i, a.title)
		if err := a.act(ctx); err != nil {
			d.check(strings.SplitN(a.title, ":", 2)[0]+" (to its end)", err)
			d.say("the remaining acts were not played")
			return
		}
	}
}

// lookAround prints what someone needs to go on by hand.
func (d *demo) lookAround() {
	fmt.Fprintf(d.out, `
Everything is still running in %[1]s. To look around:
  %[2]s/keyward --identity %[1]s/olga status
  %[2]s/keyward --identity %[1]s/olga keyring list shop
  %[2]s/keyward --identity %[1]s/ada audit list
  mariadb --socket=%[1]s/db/mysqld.sock -e 'SELECT * FROM information_schema.KEYWARD_KEYS'
To end it:
`, d.dir, d.bin)
	d.mu.Lock()
	defer d.mu.Unlock()
	var pids []string
	for _, p := range d.procs {
		if !p.ended() {
			pids = append(pids, fmt.Sprint(p.cmd.Process.Pid))
		}
	}
	fmt.Fprintf(d.out, "  kill %s; rm -r %s\n", strings.Join(pids, " "), d.dir)
}
