package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

// A writer inserts rows one by one until stopped and remembers the newest
// acknowledged one. It goes on through restarts of the server.
type writer struct {
	stop context.CancelFunc
	done chan struct{}

	mu    sync.Mutex
	acked int // inserts that the server acknowledged
}

func (d *demo) startWriter(ctx context.Context) *writer {
	ctx, stop := context.WithCancel(ctx)
	w := &writer{stop: stop, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for i := 0; ctx.Err() == nil; i++ {
			if err := d.db.exec(ctx, "INSERT INTO shop.orders (note) VALUES (?)", fmt.Sprintf("order %d", i)); err != nil {
				// The server is being killed or is starting; nothing was acknowledged.
				select {
				case <-ctx.Done():
				case <-time.After(20 * time.Millisecond):
				}
				continue
			}
			w.mu.Lock()
			w.acked++
			w.mu.Unlock()
		}
	}()
	return w
}

// progress waits until n more rows are acknowledged.
func (w *writer) progress(ctx context.Context, n int) error {
	from := w.count()
	return await(ctx, nil, 20*time.Second, func() error {
		if got := w.count() - from; got < n {
			return fmt.Errorf("%d of %d rows acknowledged", got, n)
		}
		return nil
	})
}

func (w *writer) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.acked
}

// end stops the writer and returns what was acknowledged.
func (w *writer) end() int {
	w.stop()
	<-w.done
	return w.count()
}

// killAll kills each process in turn while rows are written.
func (d *demo) killAll(ctx context.Context) error {
	for _, victim := range []struct {
		name string
		kill func() error
	}{
		{"mariadbd", func() error { d.db.kill(); return d.db.start(ctx) }},
		{"keyward-agent", func() error { d.agent.stop(syscall.SIGKILL); return nil }},
		{"keyward-kms", func() error { d.kms.stop(syscall.SIGKILL); return nil }},
	} {
		w := d.startWriter(ctx)
		err := w.progress(ctx, 50)
		if err == nil {
			err = victim.kill()
		}
		if err == nil {
			err = w.progress(ctx, 50)
		}
		d.rows += w.end()
		if err == nil {
			err = d.revive(ctx)
		}
		if err == nil {
			err = d.allRows(ctx)
		}
		d.check(fmt.Sprintf("kill -9 of %s during writes: all %d acknowledged rows are there", victim.name, d.rows), err)
		if err != nil {
			return err
		}
	}
	return nil
}

// revive restarts what was killed and waits until the server sees its keys.
func (d *demo) revive(ctx context.Context) error {
	if d.kms.ended() {
		if err := d.startKMS(ctx); err != nil {
			return err
		}
	}
	if d.agent.ended() {
		if err := d.startAgent(ctx); err != nil {
			return err
		}
	}
	return d.awaitState(ctx, "active")
}

// awaitState waits until the server's own table shows the state of its keys.
func (d *demo) awaitState(ctx context.Context, want string) error {
	return await(ctx, d.db.proc, 20*time.Second, func() error {
		var got string
		err := d.db.db.QueryRowContext(ctx, "SELECT state FROM information_schema.KEYWARD_KEYS WHERE key_id=1").Scan(&got)
		if err == nil && !strings.EqualFold(got, want) {
			err = fmt.Errorf("state of key 1 is %q, want %q", got, want)
		}
		return err
	})
}

// allRows: nothing acknowledged is lost. A row that was written but whose
// acknowledgement was cut off may be there too.
func (d *demo) allRows(ctx context.Context) error {
	n, err := d.db.count(ctx, "SELECT COUNT(*) FROM shop.orders")
	if err == nil && n < d.rows {
		err = fmt.Errorf("%d rows, %d were acknowledged", n, d.rows)
	}
	return err
}

// outage stops the key service: the running server goes on, a start is refused.
func (d *demo) outage(ctx context.Context) error {
	d.kms.stop(syscall.SIGTERM)
	w := d.startWriter(ctx)
	err := w.progress(ctx, 100)
	if err == nil {
		err = d.db.exec(ctx, "FLUSH BINARY LOGS")
	}
	if err == nil {
		err = d.db.exec(ctx, "CREATE TABLE shop.made_offline (id INT PRIMARY KEY) ENGINE=InnoDB")
	}
	d.rows += w.end()
	if err == nil {
		err = d.allRows(ctx)
	}
	d.check("the running server writes, rotates its binlog and makes tables without the key service", err)
	if err != nil {
		return err
	}
	d.db.stop()
	line, err := d.db.refusesStart(ctx, "cannot start", "key 1", "version 3", d.endpoint(), "start the key service")
	d.say("error.log: %s", line)
	d.check("a restart is refused; mariadbd's own log names key, version, endpoint and remedy", err)
	if err := d.startKMS(ctx); err != nil {
		return err
	}
	if err = d.db.start(ctx); err == nil {
		err = d.allRows(ctx)
	}
	d.check("the key service is back: the server starts and reads every row", err)
	return err
}

// stolenDisk copies the data and the agent's state, as a thief would.
func (d *demo) stolenDisk(ctx context.Context) error {
	if err := d.learnSecrets(ctx); err != nil {
		return err
	}
	d.db.stop()
	thief := d.path("thief")
	_, err := d.run(ctx, nil, "cp", "-a", d.db.dir, d.path("agent"), "--target-directory", d.mkdir("thief"))
	if err != nil {
		return err
	}
	hits, files, err := search(d.secrets, thief)
	if err == nil && len(hits) > 0 {
		err = fmt.Errorf("found in %v", hits)
	}
	d.check(fmt.Sprintf("no DEK, PIN or row is in the %d stolen files (%d secrets looked for, raw and in hex)", files, len(d.secrets)), err)
	if err := d.thiefAgent(ctx); err != nil {
		return err
	}
	if err := d.thiefServer(ctx); err != nil {
		return err
	}
	return d.db.start(ctx)
}

// learnSecrets asks the agent, as the database's own user may, for the DEKs in
// use, so that they can be looked for.
func (d *demo) learnSecrets(ctx context.Context) error {
	keys, err := socketKeys(ctx, d.path("run", "agent.sock"))
	if err != nil {
		return fmt.Errorf("ask the agent for the DEKs: %w", err)
	}
	for _, k := range keys {
		d.secrets = append(d.secrets, k, []byte(hex.EncodeToString(k)))
	}
	if len(keys) < 2 {
		return fmt.Errorf("the agent gave %d keys, want both versions of key 1", len(keys))
	}
	return nil
}

// thiefAgent starts an agent on the stolen state, but without the host secret,
// which was on another file system.
func (d *demo) thiefAgent(ctx context.Context) error {
	b, err := os.ReadFile(d.path("thief", "agent", "agent.json"))
	if err != nil {
		return err
	}
	text := strings.ReplaceAll(string(b), d.path("agent"), d.path("thief", "agent"))
	text = strings.ReplaceAll(text, d.path("run"), d.mkdir("thief", "run"))
	text = strings.ReplaceAll(text, d.path("hostsecret"), d.mkdir("thief", "hostsecret"))
	if !json.Valid([]byte(text)) {
		return fmt.Errorf("the stolen agent.json is not JSON")
	}
	name := d.path("thief", "agent", "agent.json")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		return err
	}
	_, err = d.quiet(ctx, nil, "keyward-agent", "--config", name)
	if err != nil {
		d.say("%s", d.shorten(lastLines(err.Error(), 2)))
	}
	d.check("the agent's identity can't be opened without the host secret, which is not in its state directory", refused(err, "host secret"))
	return nil
}

// thiefServer starts mariadbd on the stolen data directory.
func (d *demo) thiefServer(ctx context.Context) error {
	dir := d.path("thief", filepath.Base(d.db.dir))
	v := &server{s: d.stage, name: "thief", dir: dir}
	err := filepath.WalkDir(filepath.Join(dir), func(name string, e os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(name, ".cnf") {
			return err
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		text := strings.ReplaceAll(string(b), d.db.dir, dir)
		text = strings.ReplaceAll(text, d.path("run"), d.path("thief", "run"))
		text = strings.ReplaceAll(text, "keyward_start_timeout", "loose_keyward_start_timeout")
		return os.WriteFile(name, []byte(text), 0o644)
	})
	if err != nil {
		return err
	}
	line, err := v.refusesStart(ctx, "keyward: cannot start")
	d.say("error.log: %s", d.shorten(line))
	d.check("mariadbd refuses to start on the copy without the key service", err)
	return nil
}

func (d *demo) mkdir(elem ...string) string {
	p := d.path(elem...)
	if err := os.MkdirAll(p, 0o755); err != nil {
		d.say("mkdir: %v", err)
	}
	return p
}

// disable switches the master key off and on.
func (d *demo) disable(ctx context.Context) error {
	out, err := d.officer(ctx, "key", "disable", "shop/master")
	if err != nil {
		return err
	}
	d.show(out, 4)
	err = d.awaitState(ctx, "denied")
	d.check("the running server's status table turns to denied", err)
	if err == nil {
		err = d.nothingHandedOut(ctx)
	}
	d.check("the agent's cache is empty and it hands out nothing", err)
	if err != nil {
		return err
	}
	if err := d.runsWhileDisabled(ctx); err != nil {
		return err
	}
	if _, err := d.officer(ctx, "key", "enable", "shop/master"); err != nil {
		return err
	}
	if err = d.awaitState(ctx, "active"); err == nil {
		_, err = socketKeys(ctx, d.path("run", "agent.sock"))
	}
	d.check("enabled again: all well, nothing was restarted", err)
	if err != nil {
		return err
	}

	if _, err := d.officer(ctx, "key", "disable", "shop/master"); err != nil {
		return err
	}
	if err := d.awaitState(ctx, "denied"); err != nil {
		return err
	}
	d.db.stop()
	line, err := d.db.refusesStart(ctx, "key 1")
	d.say("error.log: %s", line)
	d.check("while disabled a restart is refused", err)
	if _, err := d.officer(ctx, "key", "enable", "shop/master"); err != nil {
		return err
	}
	if err = d.db.start(ctx); err == nil {
		err = d.allRows(ctx)
	}
	d.check("enabled again: the server starts", err)
	return err
}

func (d *demo) nothingHandedOut(ctx context.Context) error {
	keys, err := socketKeys(ctx, d.path("run", "agent.sock"))
	if err == nil {
		return fmt.Errorf("%d keys were handed out", len(keys))
	}
	if !errors.Is(err, dek.ErrDenied) {
		return fmt.Errorf("refused for another reason: %w", err)
	}
	d.say("agent: %s", lastLines(err.Error(), 1))
	// A session that is let in without asking the key service gets nothing
	// either: the cache is what it would be served from.
	held, err := d.metric(ctx, "keyward_agent_cache_keys")
	if err == nil && held != "0" {
		err = fmt.Errorf("the agent's cache holds %s keys", held)
	}
	return err
}

// metric asks the agent for one of its figures.
func (d *demo) metric(ctx context.Context, name string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.metrics+"/metrics", nil)
	if err != nil {
		return "", err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	for sc := bufio.NewScanner(res.Body); sc.Scan(); {
		if value, ok := strings.CutPrefix(sc.Text(), name+" "); ok {
			return value, nil
		}
	}
	return "", fmt.Errorf("the agent has no figure %s", name)
}

// runsWhileDisabled: no abort, no loss of the binlog.
func (d *demo) runsWhileDisabled(ctx context.Context) error {
	w := d.startWriter(ctx)
	err := w.progress(ctx, 100)
	for _, q := range []string{"FLUSH BINARY LOGS", "FLUSH TABLES", "CREATE TABLE shop.made_disabled (id INT PRIMARY KEY) ENGINE=InnoDB"} {
		if err == nil {
			err = d.db.exec(ctx, q)
		}
	}
	d.rows += w.end()
	if err == nil {
		err = d.allRows(ctx)
	}
	if err == nil {
		err = d.binlogGrows(ctx)
	}
	d.check("the running server neither aborts nor loses its binlog", err)
	return err
}

func (d *demo) binlogGrows(ctx context.Context) error {
	pos := func() (string, error) {
		var file, pos string
		var do, ignore any
		err := d.db.db.QueryRowContext(ctx, "SHOW MASTER STATUS").Scan(&file, &pos, &do, &ignore)
		return file + ":" + pos, err
	}
	before, err := pos()
	if err != nil {
		return err
	}
	if err := d.db.exec(ctx, "INSERT INTO shop.orders (note) VALUES ('while disabled')"); err != nil {
		return err
	}
	d.rows++
	after, err := pos()
	if err == nil && after == before {
		err = fmt.Errorf("the binlog stands still at %s", after)
	}
	return err
}

// socketKeys starts a cold session at the agent's socket, as a starting
// database does, and gets every key. It is meant for this demonstration only:
// nobody else has a reason to hold bare bytes.
func socketKeys(ctx context.Context, socket string) ([][]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := connector.DialAgent(ctx, socket, connector.NewProcess("mariadb", ""))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	listing, err := c.List(ctx)
	if err != nil {
		return nil, err
	}
	var keys [][]byte
	for _, r := range listing.Keyrings {
		for _, v := range r.Versions {
			k, err := c.Get(ctx, connector.ServerKey{ID: r.ID, Version: v})
			if err != nil {
				return nil, err
			}
			err = k.Use(func(b []byte) error {
				keys = append(keys, append([]byte(nil), b...))
				return nil
			})
			k.Destroy()
			if err != nil {
				return nil, err
			}
		}
	}
	return keys, nil
}
