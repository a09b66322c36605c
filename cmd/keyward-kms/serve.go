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
		Args:    cobra.NoArgs,
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
	listeners, control, err := h.listen()
	if err != nil {
		return err
	}
	doors, ctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		doors.Go(func() error { return h.server.Serve(l) })
	}
	doors.Go(func() error { return h.server.ServeControl(control) })
	doors.Go(func() error { h.authority.Run(ctx); return nil })
	if c.MetricsListen != "" {
		l, err := net.Listen("tcp", c.MetricsListen)
		if err != nil {
			return fmt.Errorf("metrics_listen: %w", err)
		}
		doors.Go(func() error { return rpc.ServeMetrics(ctx, l, h.metrics) })
	}
	doors.Go(func() error {
		<-ctx.Done()
		bound, stop := context.WithTimeout(context.WithoutCancel(ctx), drain)
		defer stop()
		h.server.Close(bound)
		return nil
	})
	h.server.SetServing(true)
	log.Info("serving", "addresses", c.Listen, "token", h.parts.token.Describe())
	if ready != nil {
		doors.Go(ready)
	}
	return doors.Wait()
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
	if err := h.openDoor(ctx); err != nil {
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

func (h *house) listen() ([]net.Listener, *net.UnixListener, error) {
	control, err := rpc.ListenControl(h.parts.config.ControlSocket)
	if err != nil {
		return nil, nil, err
	}
	var all []net.Listener
	for _, addr := range h.parts.config.Listen {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			errs := []error{fmt.Errorf("listen: %w", err), control.Close()}
			for _, open := range all {
				errs = append(errs, open.Close())
			}
			return nil, nil, errors.Join(errs...)
		}
		all = append(all, l)
	}
	return all, control, nil
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
