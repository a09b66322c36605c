package rpc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"

	"github.com/keyward/keyward/dek"
)

// A localPeer is a process of this host at the control socket.
type localPeer struct {
	credentials.CommonAuthInfo
	uid  uint32
	pid  int32
	conn net.Conn
}

// AuthType implements credentials.AuthInfo.
func (*localPeer) AuthType() string { return "peercred" }

// A localDoor admits root, and the user that the service itself runs as, by
// what the kernel says of the other end (unix(7), SO_PEERCRED).
type localDoor struct {
	admit   func(uid uint32) bool
	metrics *metrics
	refused func(remote string, err error)
}

var _ credentials.TransportCredentials = (*localDoor)(nil)

// rootOrSelf is who can read the service's memory anyway.
func rootOrSelf(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() }

// ServerHandshake implements credentials.TransportCredentials.
func (d *localDoor) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cred, err := peerCred(raw)
	if err != nil {
		return nil, nil, err
	}
	remote := fmt.Sprintf("unix:uid=%d,pid=%d", cred.Uid, cred.Pid)
	if !d.admit(cred.Uid) {
		err := fmt.Errorf("%w: control socket: user %d is neither root nor the service's own", dek.ErrDenied, cred.Uid)
		d.metrics.handshakes.WithLabelValues("user refused").Inc()
		d.refused(remote, err)
		return nil, nil, err
	}
	p := &localPeer{uid: cred.Uid, pid: cred.Pid, conn: raw}
	p.SecurityLevel = credentials.PrivacyAndIntegrity
	return raw, p, nil
}

func peerCred(c net.Conn) (*unix.Ucred, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("%w: control socket: %T is no Unix socket", dek.ErrInvalid, c)
	}
	sys, err := u.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("%w: control socket: %w", dek.ErrUnavailable, err)
	}
	var cred *unix.Ucred
	var credErr error
	err = sys.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return nil, fmt.Errorf("%w: control socket: %w", dek.ErrUnavailable, err)
	}
	return cred, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (*localDoor) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, fmt.Errorf("%w: rpc: this side serves", dek.ErrInvalid)
}

// Info implements credentials.TransportCredentials.
func (*localDoor) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}

// Clone implements credentials.TransportCredentials.
func (d *localDoor) Clone() credentials.TransportCredentials { c := *d; return &c }

// OverrideServerName implements credentials.TransportCredentials.
func (*localDoor) OverrideServerName(string) error {
	return fmt.Errorf("%w: rpc: this side serves", dek.ErrInvalid)
}

// ListenControl makes the control socket at path, mode 0600, in place of one
// that nobody answers any more. It wraps dek.ErrInvalid if something else is
// at path or others may write to its directory, and dek.ErrExists if another
// process serves there.
func ListenControl(path string) (*net.UnixListener, error) {
	dir, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("%w: control socket: %w", dek.ErrInvalid, err)
	}
	if dir.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("%w: control socket: others can write to %s: chmod go-w it", dek.ErrInvalid, filepath.Dir(path))
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("%w: control socket: %w", dek.ErrUnavailable, err)
	}
	// Who comes in before this is asked for the user all the same. A umask would
	// be of the whole process, and others make files meanwhile.
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: control socket: %w", dek.ErrUnavailable, err), l.Close())
	}
	return l, nil
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || info.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("%w: control socket: %s is there and no socket", dek.ErrInvalid, path)
	}
	if c, err := net.Dial("unix", path); err == nil {
		_ = c.Close()
		return fmt.Errorf("%w: control socket: another process serves at %s", dek.ErrExists, path)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("%w: control socket: %w", dek.ErrUnavailable, err)
	}
	return nil
}
