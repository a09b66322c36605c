package etcdstore

import (
	"context"
	"crypto/fips140"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/config"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/features"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/keyward/keyward/dek"
)

// A member is the embedded etcd. It is started below package embed, which
// always listens: nothing of it is reachable from outside the process.
type member struct {
	server  *etcdserver.EtcdServer
	opening atomic.Bool
	lock    *os.File // flock on LOCK: one process per directory
	stop    chan struct{}
	dead    chan struct{}   // closed when etcd said its last words
	purged  <-chan struct{} // closed when the purger has ended
}

const (
	memberName = "keyward"
	// A single member elects itself after 2 to 3 ticks.
	tickMilliseconds = 10
	electionTicks    = 2
	// walSegmentBytes, snapshotCount and catchUp bound what a start reads and
	// what raft holds in memory; etcd's own 64 MB, 10,000 and 5,000 are made
	// for slow followers, and there are none.
	walSegmentBytes = 8 << 20
	snapshotCount   = 1000
	catchUp         = 64
	// defragMB is how much must be free in the database file before a start
	// takes the time to rewrite it.
	defragMB = 16
	// purgeEvery is how often write-ahead files that a snapshot has made
	// needless are removed.
	purgeEvery = time.Second
)

// setSegment sets etcd's only knob for the size of its write-ahead files, a
// variable of its package.
var setSegment = sync.OnceFunc(func() { wal.SegmentSizeBytes = walSegmentBytes })

func (s *Store) openEmbedded(ctx context.Context) error {
	setSegment()
	s.member = &member{stop: make(chan struct{}), dead: make(chan struct{})}
	s.member.opening.Store(true)
	if err := s.member.prepare(s.cfg.Dir); err != nil {
		s.member.unlock()
		return err
	}
	if err := s.startMember(ctx); err != nil {
		s.member.unlock()
		return err
	}
	s.member.opening.Store(false)
	s.client = v3client.New(s.member.server)
	if err := s.reclaim(ctx); err != nil {
		s.member.close()
		return err
	}
	s.wg.Go(s.compactor)
	return nil
}

// startMember runs etcd's start in a goroutine of its own, which etcd may end
// in the middle (lastWords), by a panic, or never.
func (s *Store) startMember(ctx context.Context) error {
	dir := s.cfg.Dir
	lg := s.zapLogger()
	cfg := serverConfig(s.cfg, lg)
	done := make(chan error, 1)
	go func() {
		err := errors.New("etcd ended during its start")
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("etcd: %v", r)
			}
			done <- err
		}()
		// etcd makes member ids with SHA-1, which is no use of cryptography.
		fips140.WithoutEnforcement(func() {
			var srv *etcdserver.EtcdServer
			if srv, err = etcdserver.NewServer(cfg); err == nil {
				srv.Start()
				s.member.server = srv
			}
		})
	}()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err == nil {
		select {
		case <-s.member.server.ReadyNotify():
		case <-s.member.server.StopNotify():
			err = errors.New("etcd stopped by itself")
		case <-s.life.Done():
			err = context.Cause(s.life)
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	return s.member.startError(s, dir, err, lg)
}

// startError judges how a start went. A failed start on existing files is
// damage unless the disk is full or the caller gave up.
func (m *member) startError(s *Store, dir string, err error, lg *zap.Logger) error {
	cause := context.Cause(s.life)
	switch {
	case errors.Is(cause, dek.ErrExhausted):
		return cause
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("%w: store: open %s: %w", dek.ErrUnavailable, dir, err)
	case errors.Is(err, context.DeadlineExceeded):
		return corrupt(dir, "etcd was not ready after %v", s.cfg.ReadyTimeout)
	case cause != nil:
		return corrupt(dir, "%v", cause)
	case err != nil:
		return corrupt(dir, "%v", err)
	}
	if err := checkBroken(dir); err != nil {
		m.halt()
		return err
	}
	m.purged, _ = fileutil.PurgeFileWithDoneNotify(lg.WithOptions(zap.IncreaseLevel(zap.ErrorLevel)),
		walDir(dir), "wal", 1, purgeEvery, m.stop)
	return nil
}

func walDir(dir string) string { return filepath.Join(dir, "member", "wal") }
func dbFile(dir string) string { return filepath.Join(dir, "member", "snap", "db") }

// serverConfig is embed's configuration without listeners.
func serverConfig(c Config, lg *zap.Logger) config.ServerConfig {
	self := types.URLs{url.URL{Scheme: "unix", Host: memberName}} // named, never listened on
	return config.ServerConfig{
		Name:                              memberName,
		ClientURLs:                        self,
		PeerURLs:                          self,
		DataDir:                           c.Dir,
		SnapshotCount:                     snapshotCount,
		SnapshotCatchUpEntries:            catchUp,
		MaxSnapFiles:                      1,
		MaxWALFiles:                       0, // our own purger: etcd's wakes every 30 s
		InitialPeerURLsMap:                types.URLsMap{memberName: self},
		InitialClusterToken:               memberName,
		NewCluster:                        true,
		TickMs:                            tickMilliseconds,
		ElectionTicks:                     electionTicks,
		InitialElectionTickAdvance:        true,
		QuotaBackendBytes:                 c.QuotaBytes,
		BackendFreelistType:               "map",
		MaxTxnOps:                         MaxChanges,
		MaxRequestBytes:                   MaxBytes + MaxBytes/2,
		StrictReconfigCheck:               true,
		AuthToken:                         "", // no users: nothing but this process can reach it
		BcryptCost:                        10, // unused; zero is warned about
		CompactHashCheckTime:              time.Hour,
		WarningApplyDuration:              500 * time.Millisecond,
		WarningUnaryRequestDuration:       time.Second,
		DowngradeCheckTime:                time.Hour,
		BootstrapDefragThresholdMegabytes: defragMB,
		ServerFeatureGate:                 features.NewDefaultServerFeatureGate(memberName, lg),
		Logger:                            lg,
	}
}

// prepare makes or checks the directory, takes its lock and looks for damage
// before etcd touches a file.
func (m *member) prepare(dir string) error {
	if err := checkDir(dir); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "LOCK"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return openError(dir, err)
	}
	m.lock = lock
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%w: store: %s is in use by another process", dek.ErrPrecondition, dir)
	}
	if err := checkBroken(dir); err != nil {
		return err
	}
	if err := checkDatabase(dbFile(dir)); err != nil {
		return corrupt(dir, "%v", err)
	}
	return nil
}

// checkDir makes dir with mode 0700 or refuses one that others may use.
func checkDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return openError(dir, err)
	}
	st, err := os.Stat(dir)
	if err != nil {
		return openError(dir, err)
	}
	if p := st.Mode().Perm(); p&0o077 != 0 {
		return fmt.Errorf("%w: store: directory %s has mode %04o: chmod 0700 it", dek.ErrInvalid, dir, p)
	}
	return nil
}

func openError(dir string, err error) error {
	class := dek.ErrInvalid
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		class = dek.ErrExhausted
	} else if errors.Is(err, unix.EIO) {
		class = dek.ErrUnavailable
	}
	return fmt.Errorf("%w: store: open %s: %w", class, dir, err)
}

// checkBroken looks for write-ahead files that etcd had to cut. etcd then goes
// on with what is left, which may be less than was acknowledged.
func checkBroken(dir string) error {
	names, err := filepath.Glob(filepath.Join(walDir(dir), "*.broken"))
	if err != nil {
		return fmt.Errorf("%w: store: %w", dek.ErrInvalid, err)
	}
	for _, name := range names {
		if torn, err := tornTail(name); err == nil && torn {
			// Only an unfinished, never acknowledged write was cut off.
			if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return openError(dir, err)
			}
			continue
		}
		return corrupt(dir, "etcd cut a damaged write-ahead log and kept it as %s; acknowledged changes may be missing", filepath.Base(name))
	}
	return nil
}

// close stops the member; everything acknowledged is on disk already.
func (m *member) close() {
	close(m.stop)
	if m.purged != nil {
		<-m.purged
	}
	m.halt()
	m.unlock()
}

// halt stops etcd. It writes once more while it stops, which may be what it
// dies of: then it stands still, and there is nothing to wait for.
func (m *member) halt() {
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		m.server.HardStop()
	}()
	select {
	case <-stopped:
	case <-m.dead:
	}
}

func (m *member) unlock() {
	if m.lock != nil {
		m.lock.Close() // releases the flock; nothing was written
	}
}
