package connector

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/keyward/keyward/dek"
)

const (
	defaultRefresh      = time.Hour
	defaultMaxKeys      = 10_000
	defaultConnsPerUser = 64
	// helloTime is how long a stranger may take to introduce itself, frameTime
	// how long one frame may take, writeTime how long a peer may not read.
	helloTime = 10 * time.Second
	frameTime = 5 * time.Second
	writeTime = 10 * time.Second
)

// An InstanceRule lets a local user speak for an instance.
type InstanceRule struct {
	UID      uint32 // user id of the database server's process
	Instance string
}

// An AgentConfig configures an Agent.
type AgentConfig struct {
	// Socket is the path of the Unix socket; its directory is made 0750 if
	// absent. Required.
	Socket string
	// SocketGID is the group of socket and directory: that of the database
	// server. -1: the agent's own.
	SocketGID int
	// StateDir holds the identity, wrapped keys and the newest audit checkpoint.
	// Made 0700 if absent. Required.
	StateDir string
	// HostSecretFile seals the identity; outside StateDir. Required unless the
	// systemd credential keyward-host-secret is there.
	HostSecretFile string
	// Endpoints are host:port of the key service. Empty: those of the identity.
	Endpoints []string
	// Instances says who may use what. At least one.
	Instances []InstanceRule
	// Refresh is how often the state is asked for although nothing was told,
	// and what plugins are told to do. 0: one hour.
	Refresh time.Duration
	// OutageLimit is how long held keys are served while the service can't be
	// reached. 0: without limit.
	OutageLimit time.Duration
	// DenialGrace is how long held keys are served after the service said no.
	// 0: not at all.
	DenialGrace time.Duration
	// CallTimeout bounds one call to the key service. 0: 10 s.
	CallTimeout time.Duration
	// MaxKeys bounds the keys in memory. 0: 10,000.
	MaxKeys int
	// MaxConnsPerUser bounds the connections of one local user. 0: 64.
	MaxConnsPerUser int
	// MetricsListen is a loopback host:port or the path of a Unix socket for
	// Prometheus. Empty: none.
	MetricsListen string
	// Logger; nil: slog.Default().
	Logger *slog.Logger
	// Dial opens a connection to the service; nil: TCP.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Now tells the time; nil: time.Now.
	Now func() time.Time
}

// check reports every mistake at once and sets defaults.
func (c *AgentConfig) check() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: agent: "+format, append([]any{dek.ErrInvalid}, args...)...))
	}
	if !filepath.IsAbs(c.Socket) {
		bad("socket %q is not an absolute path", c.Socket)
	}
	if len(c.Socket) > 107 { // sun_path, unix(7)
		bad("socket path is over 107 bytes: %s", c.Socket)
	}
	if !filepath.IsAbs(c.StateDir) {
		bad("state directory %q is not an absolute path", c.StateDir)
	} else if err := checkHostSecretPlace(c.StateDir, c.HostSecretFile); c.HostSecretFile != "" && err != nil {
		errs = append(errs, err)
	}
	if len(c.Instances) == 0 {
		bad("no instance: name at least one local user and its instance")
	}
	for i, r := range c.Instances {
		if err := dek.CheckName("instance", r.Instance); err != nil {
			errs = append(errs, err)
		}
		if slices.Contains(c.Instances[:i], r) {
			bad("uid %d and instance %q are named twice", r.UID, r.Instance)
		}
	}
	for name, d := range map[string]time.Duration{"refresh": c.Refresh, "outage limit": c.OutageLimit, "denial grace": c.DenialGrace, "call timeout": c.CallTimeout} {
		if d < 0 {
			bad("%s %v is negative", name, d)
		}
	}
	if c.MaxKeys < 0 || c.MaxConnsPerUser < 0 {
		bad("a limit is negative")
	}
	if err := checkMetricsListen(c.MetricsListen); err != nil {
		errs = append(errs, err)
	}
	c.defaults()
	return errors.Join(errs...)
}

func (c *AgentConfig) defaults() {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&c.Refresh, defaultRefresh)
	set(&c.CallTimeout, defaultCallTimeout)
	if c.MaxKeys == 0 {
		c.MaxKeys = defaultMaxKeys
	}
	if c.MaxConnsPerUser == 0 {
		c.MaxConnsPerUser = defaultConnsPerUser
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
}

// An Agent serves the databases of one host over a Unix socket. It holds their
// keys in locked memory and their wrapped keys on disk.
type Agent struct {
	cfg       AgentConfig
	identity  *Identity
	client    *Client
	cache     *dek.Cache
	lock      *os.File
	listener  *net.UnixListener
	instances map[string]*instance
	rules     map[uint32][]string // instances by uid
	count     agentCounters
	refusals  chan struct{} // holds a token for each refused peer that is still there

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	users map[uint32]int
}

// NewAgent checks cfg, loads the identity and the state, and opens the socket;
// nothing is served before Run. Close it if Run is not called. Errors wrap
// dek.ErrInvalid (configuration, modes), dek.ErrNotFound (not enrolled),
// dek.ErrAuth (wrong host secret), dek.ErrExists (another agent runs),
// dek.ErrCorrupt (damaged state; the text names the way on).
func NewAgent(cfg AgentConfig) (_ *Agent, err error) {
	cfg.Instances = slices.Clone(cfg.Instances)
	if err := cfg.check(); err != nil {
		return nil, err
	}
	a := &Agent{
		cfg: cfg, instances: map[string]*instance{}, rules: map[uint32][]string{},
		conns: map[net.Conn]struct{}{}, users: map[uint32]int{}, refusals: make(chan struct{}, maxRefusals),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Close())
		}
	}()
	if err := makePrivateDir(cfg.StateDir); err != nil {
		return nil, fmt.Errorf("agent: state directory: %w", err)
	}
	if a.lock, err = lockDir(cfg.StateDir); err != nil {
		return nil, err
	}
	if a.identity, err = LoadIdentity(cfg.StateDir, cfg.HostSecretFile); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	if a.identity.host == nil {
		return nil, fmt.Errorf("%w: agent: the identity in %s is not sealed under a host secret: enrol again with one", dek.ErrInvalid, cfg.StateDir)
	}
	a.client, err = NewClient(Config{Identity: a.identity, Endpoints: cfg.Endpoints, CallTimeout: cfg.CallTimeout, Dial: cfg.Dial, Logger: cfg.Logger, Now: cfg.Now})
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	// No age limit: an outage must not take keys away. Denials purge.
	if a.cache, err = dek.NewCache(dek.CacheConfig{MaxKeys: cfg.MaxKeys}); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	for _, r := range cfg.Instances {
		a.rules[r.UID] = append(a.rules[r.UID], r.Instance)
		if a.instances[r.Instance] != nil {
			continue
		}
		if a.instances[r.Instance], err = newInstance(r.Instance, a); err != nil {
			return nil, fmt.Errorf("agent: %w", err)
		}
	}
	a.listener, err = listenSocket(cfg.Socket, cfg.SocketGID)
	return a, err
}

// lockDir makes sure that one agent uses a state directory.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600) //nolint:gosec // the operator names the directory
	if err != nil {
		return nil, diskError(path, err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%w: agent: another agent uses %s: stop it first", dek.ErrExists, dir)
	}
	return f, nil
}

// Close frees what NewAgent took. Run does it by itself.
func (a *Agent) Close() error {
	var errs []error
	if a.listener != nil {
		errs = append(errs, closeSocket(a.listener, a.cfg.Socket))
	}
	if a.cache != nil {
		a.cache.Close()
	}
	if a.client != nil {
		errs = append(errs, a.client.Close())
	}
	if a.identity != nil {
		a.identity.Close()
	}
	if a.lock != nil {
		errs = append(errs, a.lock.Close())
	}
	return errors.Join(errs...)
}

// Run serves until ctx ends, then ends every connection, waits for all its
// goroutines, saves the state and wipes the keys. It returns nil unless
// something other than ctx ended it.
func (a *Agent) Run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	for _, in := range a.instances {
		g.Go(func() error { return in.run(gctx) })
	}
	g.Go(func() error { a.client.KeepRenewed(gctx); return nil })
	g.Go(func() error { return a.serveMetrics(gctx) })
	var sessions sync.WaitGroup
	g.Go(func() error { return a.accept(gctx, &sessions) })
	g.Go(func() error {
		<-gctx.Done()
		a.hangUp()
		return nil
	})
	err := g.Wait()
	sessions.Wait()
	return errors.Join(err, a.Close())
}

// hangUp ends accepting and every session.
func (a *Agent) hangUp() {
	_ = a.listener.Close()
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range a.conns {
		_ = c.Close()
	}
}
