package etcdstore

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
)

// Config says where the records are kept. Set Dir or Endpoints, not both.
type Config struct {
	// Dir holds the embedded member's files; it is created with mode 0700 and
	// must be used by one process only. No port is opened.
	Dir string
	// Endpoints are the client URLs of an external etcd ("https://host:2379").
	Endpoints []string
	// TLS is the client side of mutual TLS; required with Endpoints.
	TLS *tls.Config
	// Prefix starts every key. Default "/keyward/". It begins and ends with "/".
	Prefix string
	// QuotaBytes bounds the embedded database file; at the limit Commit returns
	// dek.ErrExhausted. Default 512 MiB, at least 16 MiB.
	QuotaBytes int64
	// Keep is how many revisions of history stay readable for Watch; older
	// ones are compacted away. Embedded only. Default 1000.
	Keep int64
	// ReadyTimeout bounds Open. Default 30 s.
	ReadyTimeout time.Duration
	// Logger receives etcd's warnings and errors. Default: discarded.
	Logger *slog.Logger
	// OnFatal is called at most once, from its own goroutine, when the embedded
	// member can't go on (full disk, I/O error). Everything acknowledged is on
	// disk; every later call fails with the class of err. The process should
	// finish what it can and exit: etcd recovers at the next start.
	OnFatal func(err error)
}

const (
	defaultPrefix = "/keyward/"
	defaultQuota  = 512 << 20
	minQuota      = 16 << 20
	defaultKeep   = 1000
	defaultReady  = 30 * time.Second

	// MaxChanges bounds one Commit: etcd's default --max-txn-ops, which an
	// external etcd is likely to have, so the embedded one has it too.
	MaxChanges = 128
	// MaxBytes bounds the sum of paths and values of one Commit; etcd's default
	// --max-request-bytes is 1.5 MiB.
	MaxBytes = 1 << 20
)

// complete checks c and fills in the defaults; all mistakes come at once.
func (c Config) complete() (Config, error) {
	var errs []error
	bad := func(format string, a ...any) {
		errs = append(errs, fmt.Errorf("%w: store: "+format, append([]any{dek.ErrInvalid}, a...)...))
	}
	switch {
	case c.Dir == "" && len(c.Endpoints) == 0:
		bad("set a directory or endpoints")
	case c.Dir != "" && len(c.Endpoints) > 0:
		bad("set a directory or endpoints, not both")
	case c.Dir != "" && !filepath.IsAbs(c.Dir):
		bad("directory %q must be an absolute path", c.Dir)
	}
	for _, e := range c.Endpoints {
		if !strings.HasPrefix(e, "https://") {
			bad("endpoint %q must begin with https://", e)
		}
	}
	if len(c.Endpoints) > 0 && c.TLS == nil {
		bad("endpoints need a client certificate (TLS)")
	}
	if c.Prefix == "" {
		c.Prefix = defaultPrefix
	}
	if !strings.HasPrefix(c.Prefix, "/") || !strings.HasSuffix(c.Prefix, "/") {
		bad("prefix %q must begin and end with '/'", c.Prefix)
	}
	if c.QuotaBytes == 0 {
		c.QuotaBytes = defaultQuota
	}
	if c.QuotaBytes < minQuota {
		bad("quota of %d bytes is below %d", c.QuotaBytes, minQuota)
	}
	if c.Keep == 0 {
		c.Keep = defaultKeep
	}
	if c.Keep < 1 {
		bad("keep must be positive, not %d", c.Keep)
	}
	if c.ReadyTimeout <= 0 {
		c.ReadyTimeout = defaultReady
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, errors.Join(errs...)
}
