package main

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

// refused runs serve, which must end with status 1 and an error that names
// everything in says, and must not have served.
func (in *installation) refused(says ...string) {
	in.t.Helper()
	out, status := in.try("serve", "--config", in.config())
	if status != exitFailed {
		in.t.Errorf("status %d, want %d:\n%s", status, exitFailed, out)
	}
	at := strings.LastIndex(out, "\nkeyward-kms: hint:")
	if at < 0 {
		at = len(out)
	}
	said := out[strings.LastIndex(out[:at], "keyward-kms: ")+1 : at]
	for _, w := range says {
		if !strings.Contains(said, w) {
			in.t.Errorf("the error does not name %q:\n%s", w, out)
		}
	}
	if strings.Contains(out, "msg=serving") {
		in.t.Errorf("it served:\n%s", out)
	}
}

// stop ends the service in good order.
func (in *installation) stop() {
	in.t.Helper()
	in.program.end(syscall.SIGTERM)
	if code := in.program.cmd.ProcessState.ExitCode(); code != exitDone {
		in.t.Fatalf("SIGTERM: status %d, want %d\n%s", code, exitDone, in.log())
	}
}

func (in *installation) chmod(name string, mode os.FileMode) {
	in.t.Helper()
	if err := os.Chmod(in.path(name), mode); err != nil {
		in.t.Fatal(err)
	}
}

// copyDir copies a directory with its modes; what is at to is gone.
func (in *installation) copyDir(from, to string) {
	in.t.Helper()
	if err := errors.Join(os.RemoveAll(in.path(to)), os.CopyFS(in.path(to), os.DirFS(in.path(from)))); err != nil {
		in.t.Fatal(err)
	}
	for _, dir := range []string{to, to + "/etcd"} {
		if _, err := os.Stat(in.path(dir)); err == nil {
			in.chmod(dir, 0o700)
		}
	}
}

// separate keeps the audit log out of the state directory.
func separate(t *testing.T) map[string]any {
	return map[string]any{"audit_dir": filepath.Join(t.TempDir(), "audit")}
}

// TestDirectories: modes, a second process, the token's files exchanged.
func TestDirectories(t *testing.T) {
	in := newInstallation(t, nil, nil)
	second := in.try
	if out, status := second("serve", "--config", in.config()); status != exitFailed || !strings.Contains(out, "another process") {
		t.Errorf("second process: status %d:\n%s", status, out)
	}
	if err := in.unwrapAll(); err != nil {
		t.Errorf("the first after the second: %v", err)
	}
	in.stop()
	for _, dir := range []string{"state", "state/audit", "state/etcd", "token"} {
		in.chmod(dir, 0o755)
		in.refused(in.path(dir))
		in.chmod(dir, 0o700)
	}
	other := newInstallation(t, nil, nil)
	other.stop()
	rename := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	rename(in.path("token"), in.path("token.away"))
	rename(other.path("token"), in.path("token"))
	in.refused("another token")
	rename(in.path("token"), other.path("token"))
	rename(in.path("token.away"), in.path("token"))
	in.start()
	if err := in.unwrapAll(); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// TestRolledBack: a store put back in time is refused, nothing is served; the
// newest one back, all is well.
func TestRolledBack(t *testing.T) {
	in := newInstallation(t, nil, separate(t))
	in.stop()
	in.copyDir("state", "old")
	in.start()
	if _, err := in.officer.SetKeyringEnabled(in.ctx(), connector.Switch{Vault: "v", Name: "ring"}); err != nil {
		t.Fatal(err)
	}
	in.stop()
	in.copyDir("state", "new")
	in.copyDir("old", "state")
	in.refused("rollback suspected", "--accept-rollback")
	if c, err := net.Dial("tcp", in.addr); err == nil {
		_ = c.Close()
		t.Error("somebody listens")
	}
	in.copyDir("new", "state")
	in.start()
	if err := in.unwrapAll(); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("the disabled keyring: got %v, want ErrDenied", err)
	}
}

// TestWholeHostRolledBack: store and log together put back in time are found
// by the first host that has seen more.
func TestWholeHostRolledBack(t *testing.T) {
	in := newInstallation(t, nil, nil)
	in.stop()
	in.copyDir("state", "old")
	in.chmod("old/audit", 0o700)
	in.start()
	var seen []byte
	for news := 0; news < 3; { // checkpoints of records that the old log does not have
		opened, err := in.host.OpenInstance(in.ctx(), "db", true, seen)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(opened.Checkpoint, seen) {
			seen, news = opened.Checkpoint, news+1
		}
	}
	in.stop()
	in.copyDir("old", "state")
	in.chmod("state/audit", 0o700)
	in.start()
	if _, err := in.host.OpenInstance(in.ctx(), "db", true, seen); err == nil {
		t.Error("a service behind what the host saw served it")
	}
	if err := in.unwrapAll(); err == nil {
		t.Error("it served others afterwards")
	}
}

// TestFlippedBit: one bit of a sealed record, in every copy of it.
func TestFlippedBit(t *testing.T) {
	in := newInstallation(t, nil, nil)
	in.stop()
	db := in.path("state/etcd/member/snap/db")
	whole, err := os.ReadFile(db)
	if err != nil {
		t.Fatal(err)
	}
	for _, record := range []string{"keys/v/master", "keyrings/v/ring"} {
		b := bytes.Clone(whole)
		flips := 0
		for at := 0; ; {
			i := bytes.Index(b[at:], []byte(record))
			if i < 0 {
				break
			}
			at += i + len(record)
			b[at+60] ^= 4 // in the value that follows
			flips++
		}
		if flips == 0 {
			t.Fatalf("no record %s in the store", record)
		}
		if err := os.WriteFile(db, b, 0o600); err != nil {
			t.Fatal(err)
		}
		in.refused(record)
	}
	if err := os.WriteFile(db, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	in.start()
	if err := in.unwrapAll(); err != nil {
		t.Errorf("with the store put right: %v", err)
	}
}

// TestReplayedToken: a one-time token works once; the second try is refused and
// recorded.
func TestReplayedToken(t *testing.T) {
	in := newInstallation(t, nil, nil)
	token, err := connector.ReadTokenFile(in.path("admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := connector.Enroll(in.ctx(), token, connector.EnrollOptions{Dir: in.path("thief")}); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("got %v, want ErrDenied", err)
	}
	in.stop()
	segments, err := filepath.Glob(in.path("state/audit/*.log"))
	if err != nil || len(segments) != 1 {
		t.Fatalf("segments %v (%v)", segments, err)
	}
	log, err := os.ReadFile(segments[0])
	if err != nil {
		t.Fatal(err)
	}
	const alarm = "ALARM: the token was used before"
	if n := bytes.Count(log, []byte(alarm)); n != 1 {
		t.Errorf("%d alarms in the log, want 1", n)
	}
}

// TestInitTwice: the second init changes nothing and says what to do.
func TestInitTwice(t *testing.T) {
	in := newInstallation(t, nil, nil)
	in.stop()
	token := in.path("second.token")
	out, status := in.try("init", "--config", in.config(), "--admin-token-file", token)
	if status != exitFailed || !strings.Contains(out, "installation already") || !strings.Contains(out, "hint: serve it") {
		t.Errorf("status %d:\n%s", status, out)
	}
	if _, err := os.Stat(token); err == nil {
		t.Error("a second token was written")
	}
	in.start()
	if err := in.unwrapAll(); err != nil {
		t.Errorf("after the second init: %v", err)
	}
}

// TestDev: made once, then served again; half made, it says what to do.
func TestDev(t *testing.T) {
	in := &installation{t: t, dir: t.TempDir(), addr: freeAddr(t)}
	serve := []string{"dev", "--dir", in.path("dev"), "--listen", in.addr}
	for range 2 {
		in.startWith(serve...)
		in.stop()
	}
	if err := os.Remove(in.path("dev/admin.token")); err != nil { // used and thrown away
		t.Fatal(err)
	}
	in.startWith(serve...)
	in.stop()
	if err := os.Remove(in.path("dev/state/" + devMark)); err != nil { // cut short before the token was written
		t.Fatal(err)
	}
	if out, status := in.try(serve...); status != exitFailed || !strings.Contains(out, "hint:") || !strings.Contains(out, in.path("dev/state")) {
		t.Errorf("half made: status %d:\n%s", status, out)
	}
}

// smallDisk mounts a file system of some MB.
func smallDisk(t *testing.T, options string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options+",mode=0700"); err != nil {
		if os.Getenv("KEYWARD_REQUIRE_INTEGRATION") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill takes all room of a file system and returns the file that holds it.
func fill(t *testing.T, dir string) string {
	t.Helper()
	name := filepath.Join(dir, "filler")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 4096); err == nil; {
		_, err = f.Write(block)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("fill: %v", err)
	}
	return name
}

// TestAuditDiskFull: without room for records nothing is answered; with room
// again all goes on by itself.
func TestAuditDiskFull(t *testing.T) {
	disk := smallDisk(t, "size=4m")
	in := newInstallation(t, nil, map[string]any{"audit_dir": filepath.Join(disk, "audit")})
	filler := fill(t, disk)
	var err error
	for range 10_000 { // the room made ahead is used up first
		if err = in.unwrapAll(); err != nil {
			break
		}
	}
	if !errors.Is(err, dek.ErrExhausted) && !errors.Is(err, dek.ErrUnavailable) {
		t.Fatalf("full: got %v, want ErrExhausted or ErrUnavailable", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second)
	for err != nil && time.Now().Before(deadline) {
		err = in.unwrapAll()
	}
	if err != nil {
		t.Fatalf("not recovered: %v\n%s", err, in.log())
	}
	in.stop()
}

// TestStoreDiskFull: an embedded store without room ends the service with one
// clear error and a status; with room it starts, and nothing acknowledged is
// missing.
func TestStoreDiskFull(t *testing.T) {
	disk := smallDisk(t, "size=64m")
	more := separate(t)
	more["state_dir"] = filepath.Join(disk, "state")
	in := newInstallation(t, nil, more)
	filler := fill(t, disk)
	acked := in.ring.Current
	for range 10_000 { // the room that etcd made ahead is used up first
		r, err := in.officer.RollKeyring(in.ctx(), "", "v", "ring")
		if err != nil {
			break
		}
		acked = r.Current
	}
	select {
	case <-in.program.done:
	case <-time.After(30 * time.Second):
		t.Fatalf("it goes on without a store: %s", in.log())
	}
	if code := in.program.cmd.ProcessState.ExitCode(); code != exitFailed || !strings.Contains(in.log(), "keyward-kms: exhausted: store: no space left for "+filepath.Join(disk, "state")) {
		t.Errorf("status %d:\n%s", code, in.log())
	}
	in.refused("no space left")
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	in.start()
	r, err := in.officer.Keyring(in.ctx(), "v", "ring")
	if err != nil || r.Current < acked {
		t.Errorf("version %d is current (%v), %d was acknowledged", r.Current, err, acked)
	}
	if err := in.unwrapAll(); err != nil {
		t.Errorf("with room again: %v", err)
	}
}
