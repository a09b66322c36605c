package connector

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyward/keyward/dek"
)

// listenSocket opens the agent's socket: directory 0750 and socket 0660, both
// of our user and the given group. The socket is made under another name and
// renamed into place with its mode set, so nobody can connect before. A stale
// socket is replaced only if nobody answers on it.
func listenSocket(path string, gid int) (*net.UnixListener, error) {
	dir := filepath.Dir(path)
	if err := socketDir(dir, gid); err != nil {
		return nil, err
	}
	if err := checkStale(path); err != nil {
		return nil, err
	}
	tmp := filepath.Join(dir, fmt.Sprintf(".%d", os.Getpid()))
	_ = os.Remove(tmp)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("%w: agent: listen on %s: %w", dek.ErrUnavailable, path, err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(tmp, 0o660) //nolint:gosec // the group is the database server's
	if err == nil && gid >= 0 {
		err = os.Lchown(tmp, -1, gid)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return nil, errors.Join(diskError(path, err), l.Close())
	}
	return l, nil
}

// socketDir makes the directory or refuses one that others could use to put a
// socket of their own in our place.
func socketDir(dir string, gid int) error {
	err := os.Mkdir(dir, 0o750)
	if err == nil && gid >= 0 {
		err = os.Chown(dir, -1, gid)
	}
	if err == nil {
		err = os.Chmod(dir, 0o750) //nolint:gosec // whatever the umask; the group is the database server's
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return diskError(dir, err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return diskError(dir, err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.IsDir() || !ok:
		return fmt.Errorf("%w: agent: %s is not a directory", dek.ErrInvalid, dir)
	case st.Uid != uint32(os.Geteuid()) && st.Uid != 0: //nolint:gosec // a uid
		return fmt.Errorf("%w: agent: socket directory %s belongs to uid %d: chown it to the agent's user", dek.ErrInvalid, dir, st.Uid)
	case info.Mode().Perm()&0o027 != 0:
		return fmt.Errorf("%w: agent: socket directory %s has mode %04o: chmod 750 it", dek.ErrInvalid, dir, info.Mode().Perm())
	}
	return nil
}

// checkStale refuses a path that is not a socket, or one that is served.
func checkStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return diskError(path, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%w: agent: %s is there and is not a socket: move it away", dek.ErrInvalid, path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = c.Close()
		return fmt.Errorf("%w: agent: another agent answers on %s: stop it first", dek.ErrExists, path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%w: agent: %s: %w: remove it if no agent runs", dek.ErrExists, path, err)
	}
	return nil
}

// closeSocket stops listening and removes the path if it is still ours.
func closeSocket(l *net.UnixListener, path string) error {
	err := l.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	// Refused means that no younger agent has put its own socket there.
	if checkStale(path) == nil {
		_ = os.Remove(path)
	}
	return err
}

// peerUID returns the user at the other end, as the kernel knew it when the
// connection was made.
func peerUID(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, cerr
	}
	return cred.Uid, nil
}

// accept serves connections until the listener is closed. sessions is done
// when all of them have ended.
func (a *Agent) accept(ctx context.Context, sessions *sync.WaitGroup) error {
	for {
		c, err := a.listener.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				_ = c.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("agent: accept: %w", err)
			}
			a.cfg.Logger.Error("accept failed", "err", err) // out of descriptors: wait for some
			if !sleep(ctx, firstRetry) {
				return nil
			}
			continue
		}
		sessions.Go(func() { a.serve(ctx, c) })
	}
}

// serve checks who is there and runs the session.
func (a *Agent) serve(ctx context.Context, c *net.UnixConn) {
	defer func() { _ = c.Close() }()
	uid, err := peerUID(c)
	if err != nil {
		a.cfg.Logger.Error("no peer credentials", "err", err)
		return
	}
	if why := a.admit(c, uid); why != nil {
		a.count.refused.Add(1)
		a.cfg.Logger.Warn("connection refused", "uid", uid, "err", why)
		a.refuse(ctx, c, why)
		return
	}
	defer a.dismiss(c, uid)
	if ctx.Err() != nil {
		return
	}
	newSession(a, c, uid).run(ctx)
}

const (
	// refusalTime is how long a refused peer has to read why.
	refusalTime = time.Second
	// maxRefusals bounds the refused connections that are kept open for it.
	maxRefusals = 16
)

// refuse says why, and lets the peer's HELLO come before the connection ends:
// a peer whose HELLO met a closed socket would see that, and not the reason.
func (a *Agent) refuse(ctx context.Context, c *net.UnixConn, why error) {
	_ = c.SetDeadline(time.Now().Add(refusalTime))
	_, _ = c.Write(appendError(nil, 0, socketClass(why), oneLine(why.Error())))
	select {
	case a.refusals <- struct{}{}:
	default: // a crowd: it must not use up our descriptors
		return
	}
	defer func() { <-a.refusals }()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	_ = c.CloseWrite()
	_, _ = io.CopyN(io.Discard, c, maxFrame)
}

// admit counts the connection in, or says why not.
func (a *Agent) admit(c net.Conn, uid uint32) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.rules[uid]) == 0 {
		return fmt.Errorf("%w: uid %d may use no instance on this host: add it to the agent's configuration", dek.ErrDenied, uid)
	}
	if a.users[uid] >= a.cfg.MaxConnsPerUser {
		return fmt.Errorf("%w: uid %d has %d connections to the agent already: close some", dek.ErrUnavailable, uid, a.users[uid])
	}
	a.users[uid]++
	a.conns[c] = struct{}{}
	return nil
}

func (a *Agent) dismiss(c net.Conn, uid uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.users[uid]--
	if a.users[uid] == 0 {
		delete(a.users, uid)
	}
	delete(a.conns, c)
}
