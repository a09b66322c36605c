package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/identity"
	"github.com/keyward/keyward/kms/rpc"
)

// drain is how long calls that are inside may take to end at shutdown.
const drain = 10 * time.Second

func newServe(s *streams) *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:     "serve",
		Short:   "Serve until SIGTERM",
		Example: "  keyward-kms serve --config /etc/keyward/kms.json",
		Args:    noArgs,
		PreRunE: needFlags("config"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := loadConfig(config)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), c, newLogger(s.err), nil)
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "configuration file")
	return cmd
}

// A house is everything that serves: the rules on their parts, the authority
// and the doors.
type house struct {
	parts     *parts
	service   *kms.Service
	authority *identity.Authority
	server    *rpc.Server
	metrics   *prometheus.Registry
}

// serve runs until ctx ends. ready, if not nil, is called once the doors are
// open.
func serve(ctx context.Context, c *Config, log *slog.Logger, ready func() error) (err error) {
	h, err := openHouse(ctx, c, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	open, err := h.listen()
	if err != nil {
		return err
	}
	running, ctx := errgroup.WithContext(ctx)
	for _, l := range open.network {
		running.Go(func() error { return h.server.Serve(l) })
	}
	running.Go(func() error { return h.server.ServeControl(open.control) })
	running.Go(func() error { h.authority.Run(ctx); return nil })
	if open.metrics != nil {
		running.Go(func() error { return rpc.ServeMetrics(ctx, open.metrics, h.metrics) })
	}
	running.Go(func() error { // an embedded store that can't go on ends the service
		select {
		case err := <-h.parts.fatal:
			return err
		case <-ctx.Done():
			return nil
		}
	})
	running.Go(func() error {
		<-ctx.Done()
		bound, stop := context.WithTimeout(context.WithoutCancel(ctx), drain)
		defer stop()
		h.server.Close(bound)
		return nil
	})
	running.Go(func() error { h.tellHealth(ctx); return nil })
	log.Info("serving", "addresses", c.Listen, "token", h.parts.token.Describe())
	if ready != nil {
		running.Go(ready)
	}
	return running.Wait()
}

// healthEvery is how late a service that stopped itself may be noticed by who
// asks for its health.
const healthEvery = time.Second

// tellHealth keeps the health service true until ctx ends: a service that found
// its store rolled back still answers, but does not serve.
func (h *house) tellHealth(ctx context.Context) {
	tick := time.NewTicker(healthEvery)
	defer tick.Stop()
	for {
		h.server.SetServing(h.service.Ready() == nil)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// openHouse opens everything but the doors.
func openHouse(ctx context.Context, c *Config, log *slog.Logger) (*house, error) {
	p, err := openParts(ctx, c, log)
	if err != nil {
		return nil, err
	}
	h := &house{parts: p, metrics: prometheus.NewRegistry()}
	h.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	cfg := p.kmsConfig(nil)
	cfg.Problems = h.problems
	if h.service, err = kms.Open(ctx, cfg); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	if err = pinFirst(c, p.token); err == nil {
		err = h.openDoor(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, h.close())
	}
	return h, nil
}

func (h *house) openDoor(ctx context.Context) (err error) {
	c := h.parts.config
	if h.authority, err = openAuthority(ctx, h.parts, h.service); err != nil {
		return err
	}
	h.server, err = rpc.NewServer(rpc.Config{
		Backend: rpc.NewBackend(h.service), Identities: h.authority, Records: h.parts.journal,
		Rules: h.parts.policy, AuditLog: journal{h.parts.journal}, Endpoints: c.endpoints(),
		Registerer: h.metrics, Logger: h.parts.log,
	})
	return err
}

func openAuthority(ctx context.Context, p *parts, s *kms.Service) (*identity.Authority, error) {
	a, err := identity.Open(ctx, identity.Config{
		Signer: s.CASigner(), Blobs: s, Names: p.config.Names, Installation: s.Installation(),
		ClientLifetime: time.Duration(p.config.ClientDays) * 24 * time.Hour, Logger: p.log,
	})
	if err != nil {
		return nil, fmt.Errorf("certificates: %w", err)
	}
	return a, nil
}

// problems adds to the status what the rules can't see.
func (h *house) problems() []kms.Problem {
	if h.authority == nil {
		return nil
	}
	left := time.Until(h.authority.ServerNotAfter())
	if left > 7*24*time.Hour {
		return nil
	}
	return []kms.Problem{{Severity: "yellow", Text: fmt.Sprintf("the server's certificate ends in %.0f h and was not renewed", left.Hours()),
		Remedy: "look for \"certificate\" in the service's log; restart renews it too"}}
}

// doors are what clients come in by.
type doors struct {
	control *net.UnixListener
	network []net.Listener
	metrics net.Listener // nil: none
}

// listen opens all doors or none.
func (h *house) listen() (d *doors, err error) {
	c := h.parts.config
	d = new(doors)
	if d.control, err = rpc.ListenControl(c.ControlSocket); err != nil {
		return nil, err
	}
	for _, addr := range c.Listen {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%w: listen: %w", dek.ErrUnavailable, err), d.close())
		}
		d.network = append(d.network, l)
	}
	if c.MetricsListen != "" {
		if d.metrics, err = net.Listen("tcp", c.MetricsListen); err != nil {
			return nil, errors.Join(fmt.Errorf("%w: metrics_listen: %w", dek.ErrUnavailable, err), d.close())
		}
	}
	return d, nil
}

func (d *doors) close() error {
	errs := []error{d.control.Close()}
	for _, l := range d.network {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// close ends the service after its doors, then what it stands on.
func (h *house) close() error {
	var errs []error
	if h.service != nil {
		errs = append(errs, h.service.Close())
	}
	return errors.Join(append(errs, h.parts.Close())...)
}

// endpoints are what enrolment tokens tell clients to dial: every name with
// every listening port.
func (c *Config) endpoints() []string {
	var out []string
	for _, l := range c.Listen {
		_, port, err := net.SplitHostPort(l)
		if err != nil {
			continue // check refused it
		}
		for _, n := range c.Names {
			out = append(out, net.JoinHostPort(n, port))
		}
	}
	return out
}
