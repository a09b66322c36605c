package rpc

import (
	"context"
	"sync"
	"time"
)

// sweepEvery is how often open streams are asked whether their identity still
// stands: a revocation made on any node cuts them within a second.
const sweepEvery = 400 * time.Millisecond

// openCalls are the streams that are open now.
type openCalls struct {
	mu    sync.Mutex
	calls map[*call]struct{}
}

func (o *openCalls) add(c *call) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.calls == nil {
		o.calls = make(map[*call]struct{})
	}
	o.calls[c] = struct{}{}
}

func (o *openCalls) remove(c *call) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.calls, c)
}

func (o *openCalls) list() []*call {
	o.mu.Lock()
	defer o.mu.Unlock()
	list := make([]*call, 0, len(o.calls))
	for c := range o.calls {
		list = append(list, c)
	}
	return list
}

// sweep ends streams whose identity no longer stands. The first time the
// handler is told, so that the client learns the class; if the stream is still
// there the next time (a client that does not read), its connection goes.
func (s *Server) sweep() {
	s.sweeping.Lock()
	defer s.sweeping.Unlock()
	for _, c := range s.open.list() {
		err := s.standing(c)
		if err == nil {
			continue
		}
		if c.cuts++; c.cuts == 1 {
			s.metrics.cut.Inc()
			c.cancel(err)
		} else {
			_ = c.conn.Close() // it is being cut: nothing can be done about a failure
		}
	}
}

// sweepUntil sweeps until ctx ends.
func (s *Server) sweepUntil(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.sweep()
		}
	}
}

// endStreams tells every open stream that the service stops.
func (s *Server) endStreams() {
	for _, c := range s.open.list() {
		c.cancel(errClosing)
	}
}
