package etcdstore

import (
	"context"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/keyward/keyward/dek"
)

// openRemote connects to external endpoints and proves that one answers.
func (s *Store) openRemote(ctx context.Context) error {
	tls := s.cfg.TLS.Clone()
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            s.cfg.Endpoints,
		TLS:                  tls,
		DialTimeout:          3 * time.Second,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		AutoSyncInterval:     0, // the endpoints that were configured, no others
		Logger:               zap.New(slogCore{log: s.cfg.Logger}),
	})
	if err != nil {
		return fmt.Errorf("%w: store: connect to %v: %w", dek.ErrUnavailable, s.cfg.Endpoints, err)
	}
	s.client = client
	if err := s.Health(ctx); err != nil {
		client.Close() // the reason for the failure is err
		return fmt.Errorf("open store at %v: %w", s.cfg.Endpoints, err)
	}
	return nil
}
