package connector

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/keyward/keyward/dek"
)

// agentCounters count since the start.
type agentCounters struct {
	unwraps     atomic.Uint64 // wrapped keys sent to the service
	denied      atomic.Uint64 // answers that were no
	unavailable atomic.Uint64 // calls without an answer
	failedGets  atomic.Uint64 // GETs that got an error
	refused     atomic.Uint64 // connections of users without a right
	malformed   atomic.Uint64 // connections ended for what they sent
}

// outcome counts how a call to the service ended.
func (c *agentCounters) outcome(err error) {
	switch {
	case errors.Is(err, dek.ErrDenied):
		c.denied.Add(1)
	case errors.Is(err, dek.ErrUnavailable):
		c.unavailable.Add(1)
	}
}

// checkMetricsListen wants a loopback address or an absolute path.
func checkMetricsListen(s string) error {
	if s == "" || filepath.IsAbs(s) {
		return nil
	}
	at, err := netip.ParseAddrPort(s)
	if err != nil || !at.Addr().IsLoopback() {
		return fmt.Errorf("%w: agent: metrics listener %q is neither a loopback host:port nor the absolute path of a socket", dek.ErrInvalid, s)
	}
	return nil
}

// serveMetrics answers GET /metrics until ctx ends.
func (a *Agent) serveMetrics(ctx context.Context) error {
	if a.cfg.MetricsListen == "" {
		<-ctx.Done()
		return nil
	}
	l, err := a.metricsListener()
	if err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	if err := registry.Register(metrics{a}); err != nil {
		return errors.Join(fmt.Errorf("agent: metrics: %w", err), l.Close())
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: frameTime, WriteTimeout: writeTime}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("agent: metrics: %w", err)
	}
	return nil
}

func (a *Agent) metricsListener() (net.Listener, error) {
	if strings.HasPrefix(a.cfg.MetricsListen, "/") {
		return listenSocket(a.cfg.MetricsListen, a.cfg.SocketGID)
	}
	l, err := net.Listen("tcp", a.cfg.MetricsListen)
	if err != nil {
		return nil, fmt.Errorf("%w: agent: metrics: %w", dek.ErrUnavailable, err)
	}
	return l, nil
}

// metrics reads the agent's numbers at scrape time.
type metrics struct{ a *Agent }

// Describe sends nothing: the set of series depends on the instances.
func (metrics) Describe(chan<- *prometheus.Desc) {}

// Collect sends every series.
func (m metrics) Collect(ch chan<- prometheus.Metric) {
	counter := func(name, help string, v uint64) {
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc("keyward_agent_"+name, help, nil, nil), prometheus.CounterValue, float64(v))
	}
	gauge := func(name, help string, v float64) {
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc("keyward_agent_"+name, help, nil, nil), prometheus.GaugeValue, v)
	}
	s, c := m.a.cache.Stats(), &m.a.count
	counter("cache_hits_total", "Keys served from memory.", s.Hits)
	counter("cache_misses_total", "Keys that had to be asked for.", s.Misses)
	counter("cache_purged_total", "Keys dropped because the service said no.", s.Purged)
	counter("cache_evicted_total", "Keys that made room.", s.Evicted)
	counter("unwraps_total", "Wrapped keys sent to the key service.", c.unwraps.Load())
	counter("denied_total", "Answers of the key service that were no.", c.denied.Load())
	counter("unavailable_total", "Calls without an answer of the key service.", c.unavailable.Load())
	counter("failed_gets_total", "Database requests for a key that got an error.", c.failedGets.Load())
	counter("refused_connections_total", "Connections of local users without a right.", c.refused.Load())
	counter("malformed_total", "Connections ended for a malformed or unfinished request.", c.malformed.Load())
	gauge("cache_keys", "Keys held.", float64(s.Keys))
	gauge("locked_bytes", "Locked memory for keys.", float64(dek.Memory().Bytes))
	_, until := m.a.identity.Validity()
	gauge("certificate_seconds", "Life left in the agent's certificate.", until.Sub(m.a.cfg.Now()).Seconds())
	for _, in := range m.a.instances {
		in.collect(ch)
	}
}

func (in *instance) collect(ch chan<- prometheus.Metric) {
	gauge := func(name, help string, v float64) {
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc("keyward_agent_"+name, help, []string{"instance"}, nil), prometheus.GaugeValue, v, in.name)
	}
	h := in.health()
	gauge("state_age_seconds", "Time since the key service last confirmed the state.", h.Age.Seconds())
	gauge("stale", "1 if the key service can't be reached.", boolFloat(h.Stale))
	gauge("denied_keyrings", "Keyrings the key service refuses.", float64(h.Denied))
	gauge("state_unsaved", "1 if the state could not be written to disk.", boolFloat(h.Unsaved != ""))
}

func boolFloat(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// An InstanceHealth is how an instance stands on this host.
type InstanceHealth struct {
	Instance string        `json:"instance"`
	Stale    bool          `json:"stale"`    // the key service can't be reached
	Age      time.Duration `json:"age"`      // since its last word; 0: never heard
	Denied   int           `json:"denied"`   // keyrings it refuses
	Keyrings int           `json:"keyrings"` // keyrings there are
	LastErr  string        `json:"last_error,omitempty"`
	Unsaved  string        `json:"unsaved,omitempty"` // why the state could not be written to disk
}

func (in *instance) health() InstanceHealth {
	in.mu.Lock()
	defer in.mu.Unlock()
	h := InstanceHealth{Instance: in.name, Stale: in.stale, Keyrings: len(in.state.Keyrings)}
	if !in.state.Contact.IsZero() {
		h.Age = max(0, in.cfg.Now().Sub(in.state.Contact))
	}
	for i := range in.state.Keyrings {
		if in.listState(&in.state.Keyrings[i]) == ListDenied {
			h.Denied++
		}
	}
	if in.lastErr != nil {
		h.LastErr = in.lastErr.Error()
	}
	if in.unsaved != nil {
		h.Unsaved = in.unsaved.Error()
	}
	return h
}

// Health reports on every instance, for status output.
func (a *Agent) Health() []InstanceHealth {
	out := make([]InstanceHealth, 0, len(a.instances))
	for _, in := range a.instances {
		out = append(out, in.health())
	}
	return out
}
