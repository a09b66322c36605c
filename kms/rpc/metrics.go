package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/keyward/keyward/dek"
)

// metrics count by method and class; no label ever names a principal or an
// object.
type metrics struct {
	calls      *prometheus.CounterVec
	seconds    *prometheus.HistogramVec
	handshakes *prometheus.CounterVec
	cut        prometheus.Counter
	unrecorded prometheus.Counter
}

func newMetrics(l lanes) (*metrics, []prometheus.Collector) {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "keyward_rpc_calls_total", Help: "Calls that ended, by method and class of the answer.",
		}, []string{"method", "class"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "keyward_rpc_seconds", Help: "Time of calls, streams left out, by method.",
			Buckets: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30},
		}, []string{"method"}),
		handshakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "keyward_rpc_handshakes_total", Help: "TLS handshakes, by result.",
		}, []string{"result"}),
		cut: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keyward_rpc_streams_cut_total", Help: "Streams ended because the identity was revoked or its certificate ended.",
		}),
		unrecorded: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keyward_rpc_strangers_unrecorded_total", Help: "Refusals of strangers beyond the rate that is recorded one by one.",
		}),
	}
	all := []prometheus.Collector{m.calls, m.seconds, m.handshakes, m.cut, m.unrecorded}
	for name, slots := range l {
		all = append(all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "keyward_rpc_in_flight", Help: "Calls inside, by lane.", ConstLabels: prometheus.Labels{"lane": string(name)},
		}, func() float64 { return float64(len(slots)) }))
	}
	return m, all
}

// ServeMetrics answers GET /metrics on l until ctx ends. l must be a Unix
// socket or listen on a loopback address, since there is no authentication:
// any other wraps dek.ErrInvalid. It closes l.
func ServeMetrics(ctx context.Context, l net.Listener, g prometheus.Gatherer) error {
	if a, ok := l.Addr().(*net.TCPAddr); ok && !a.IP.IsLoopback() {
		_ = l.Close()
		return fmt.Errorf("%w: metrics address %v: use a loopback address or a Unix socket", dek.ErrInvalid, a)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, MaxHeaderBytes: 8 * kib}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	defer stop()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("%w: serve metrics: %w", dek.ErrUnavailable, err)
	}
	return nil
}
