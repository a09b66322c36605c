package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

// Config is what a Server works with. Fields without a word on zero are
// required.
type Config struct {
	Backend    Backend
	Identities Identities
	Records    Recorder
	Rules      Rules
	AuditLog   AuditLog
	// Endpoints are the host:port addresses that enrolment tokens carry.
	Endpoints []string
	// ControlUser says who may use the control socket; nil: root and the user
	// that this process runs as.
	ControlUser func(uid uint32) bool
	// Registerer takes the metrics; nil: nobody sees them.
	Registerer prometheus.Registerer
	// Now tells the time; nil: time.Now.
	Now func() time.Time
	// Logger gets what strangers don't; nil: none.
	Logger *slog.Logger
}

func (c *Config) check() error {
	if err := c.Backend.check(); err != nil {
		return err
	}
	if c.Identities == nil || c.Records == nil || c.Rules == nil || c.AuditLog == nil || len(c.Endpoints) == 0 {
		return fmt.Errorf("%w: rpc: Identities, Records, Rules, AuditLog and Endpoints are required", dek.ErrInvalid)
	}
	for _, e := range c.Endpoints {
		if host, port, err := net.SplitHostPort(e); err != nil || host == "" || port == "" {
			return fmt.Errorf("%w: rpc: endpoint %.80q is not host:port", dek.ErrInvalid, e)
		}
	}
	if c.ControlUser == nil {
		c.ControlUser = rootOrSelf
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// A Server is the front door. It may be used concurrently.
type Server struct {
	config  Config
	backend Backend
	rows    map[string]*method
	lanes   lanes
	shares  shares
	metrics *metrics
	health  *health.Server

	network *grpc.Server // over TLS
	control *grpc.Server // over the control socket

	open      openCalls
	sweeping  sync.Mutex
	strangers strangerLimit
	stop      context.CancelFunc
	running   sync.WaitGroup // sweeper, receivers
}

// NewServer checks c and the method table; it wraps dek.ErrInvalid and names
// what is missing. Close ends what it starts.
func NewServer(c Config) (*Server, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	rows, err := compileMethods(methods(), descriptions(), c.Rules)
	if err != nil {
		return nil, err
	}
	s := &Server{config: c, backend: c.Backend, rows: rows, lanes: newLanes(), shares: shares{held: map[shareKey]*share{}}, health: health.NewServer()}
	var collectors []prometheus.Collector
	s.metrics, collectors = newMetrics(s.lanes)
	for _, m := range collectors {
		if c.Registerer == nil {
			break
		}
		if err := c.Registerer.Register(m); err != nil {
			return nil, fmt.Errorf("%w: rpc: metrics: %w", dek.ErrInvalid, err)
		}
	}
	codec := newCodec()
	s.network = s.newGRPC(codec, &tlsDoor{identities: c.Identities, metrics: s.metrics, refused: s.refusedHandshake, strangers: new(atomic.Int32)})
	s.control = s.newGRPC(codec, &localDoor{admit: c.ControlUser, metrics: s.metrics, refused: s.refusedHandshake})
	s.register()
	s.SetServing(false)
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	s.running.Go(func() { s.sweepUntil(ctx) })
	return s, nil
}

// newGRPC makes a server with our bounds. A connection may be idle for ever:
// agents keep one open to be told of changes.
func (s *Server) newGRPC(c *codec, creds credentials.TransportCredentials) *grpc.Server {
	return grpc.NewServer(
		grpc.Creds(creds),
		grpc.ForceServerCodecV2(c),
		grpc.UnknownServiceHandler(s.unknown),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.MaxConcurrentStreams(1024),
		grpc.MaxRecvMsgSize(maxBatchBytes),
		grpc.MaxSendMsgSize(16*1024*kib),
		grpc.MaxHeaderListSize(16*kib),
		grpc.WaitForHandlers(true),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
}

func (s *Server) register() {
	admin := &adminServer{server: s}
	s.network.RegisterService(s.wrap(&kmspb.Enrolment_ServiceDesc), &enrolmentServer{server: s})
	s.network.RegisterService(s.wrap(&kmspb.Instances_ServiceDesc), &instanceServer{server: s})
	s.network.RegisterService(s.wrap(&kmspb.Admin_ServiceDesc), admin)
	s.network.RegisterService(s.wrap(&healthpb.Health_ServiceDesc), s.health)
	s.control.RegisterService(s.wrap(&kmspb.Admin_ServiceDesc), admin)
	s.control.RegisterService(s.wrap(&healthpb.Health_ServiceDesc), s.health)
}

// SetServing is what the health service tells to anyone who asks.
func (s *Server) SetServing(ok bool) {
	state := healthpb.HealthCheckResponse_NOT_SERVING
	if ok {
		state = healthpb.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", state)
}

// Serve answers TLS connections on l until Close. It closes l. Errors wrap
// dek.ErrUnavailable; after Close it returns nil.
func (s *Server) Serve(l net.Listener) error { return serve(s.network, l) }

// ServeControl answers the control socket until Close, as Serve does.
func (s *Server) ServeControl(l *net.UnixListener) error { return serve(s.control, l) }

func serve(g *grpc.Server, l net.Listener) error {
	if err := g.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("%w: serve %v: %w", dek.ErrUnavailable, l.Addr(), err)
	}
	return nil
}

// Close stops listening, tells open streams, lets calls that are inside end
// until ctx ends, then cuts what is left. It returns when everything has
// ended; further calls return at once.
func (s *Server) Close(ctx context.Context) {
	s.health.Shutdown()
	s.stop()
	calm := make(chan struct{})
	go func() {
		defer close(calm)
		s.endStreams()
		s.network.GracefulStop()
		s.control.GracefulStop()
	}()
	select {
	case <-calm:
	case <-ctx.Done():
		s.network.Stop()
		s.control.Stop()
		<-calm
	}
	s.running.Wait()
}
