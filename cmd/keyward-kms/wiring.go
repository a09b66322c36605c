package main

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/access"
	"github.com/keyward/keyward/kms/audit"
	"github.com/keyward/keyward/kms/etcdstore"
)

type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

// parts are what the rules stand on. Close ends them, the newest first.
type parts struct {
	config  *Config
	log     *slog.Logger
	token   token
	store   *etcdstore.Store
	policy  *access.Policy
	journal *audit.Log // after the service opened it
	fatal   chan error // capacity 1: why the store can't go on
	closers []io.Closer
}

// openParts opens the token that StateDir is pinned to, and the store; the
// audit log is opened by the service, which knows its key.
func openParts(ctx context.Context, c *Config, log *slog.Logger) (*parts, error) {
	expect, err := readPin(c)
	if err != nil {
		return nil, err
	}
	return openPartsOn(ctx, c, expect, log)
}

// openPartsOn is openParts on the expected token, zero for any.
func openPartsOn(ctx context.Context, c *Config, expect hsm.Identity, log *slog.Logger) (*parts, error) {
	p := &parts{config: c, log: log, fatal: make(chan error, 1)}
	if err := makeDir("state_dir", c.StateDir); err != nil {
		return nil, err
	}
	var err error
	if p.policy, err = access.New(); err != nil {
		return nil, err
	}
	if p.token, err = openToken(ctx, c, expect, log); err != nil {
		return nil, err
	}
	p.closers = append(p.closers, p.token)
	tlsConfig, err := etcdTLS(c)
	if err == nil {
		p.store, err = etcdstore.Open(ctx, etcdstore.Config{
			Dir: c.etcdDir(), Endpoints: c.EtcdEndpoints, TLS: tlsConfig, Logger: log,
			OnFatal: func(err error) { p.fatal <- err }}) // called once at most
	}
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	p.closers = append(p.closers, p.store)
	return p, nil
}

// Close closes everything once.
func (p *parts) Close() error {
	var errs []error
	for i := len(p.closers) - 1; i >= 0; i-- {
		errs = append(errs, p.closers[i].Close())
	}
	p.closers = nil
	return errors.Join(errs...)
}

// kmsConfig is what the rules get. link joins a new audit log to an older one.
func (p *parts) kmsConfig(link *audit.Link) kms.Config {
	cfg := kms.Config{
		Token: p.token, Store: p.store, Clock: systemClock{}, Authorizer: p.policy,
		Strict: *p.config.Strict, Logger: p.log,
		OpenAudit: func(ctx context.Context, signer crypto.Signer) (kms.Auditor, error) {
			l, err := audit.Open(ctx, audit.Config{Dir: p.config.AuditDir, Signer: signer, Link: link, Logger: p.log})
			if err != nil {
				return nil, err
			}
			p.journal = l
			return l, nil
		},
	}
	if p.config.BackupDir != "" {
		cfg.Backups = backupDir{p.config.BackupDir}
	}
	return cfg
}

// etcdDir is where the embedded store is; empty with external endpoints.
func (c *Config) etcdDir() string {
	if len(c.EtcdEndpoints) > 0 {
		return ""
	}
	return filepath.Join(c.StateDir, "etcd")
}

// recipient reads the recovery recipient's text; empty if none is configured.
func (c *Config) recipient() (string, error) {
	if c.RecoveryRecipientFile == "" {
		return "", nil
	}
	b, err := os.ReadFile(c.RecoveryRecipientFile)
	if err != nil {
		return "", fmt.Errorf("recovery_recipient_file: %w", err)
	}
	return string(b), nil
}

func etcdTLS(c *Config) (*tls.Config, error) {
	if len(c.EtcdEndpoints) == 0 {
		return nil, nil
	}
	ca, err := os.ReadFile(c.EtcdCA)
	if err != nil {
		return nil, fmt.Errorf("etcd_ca: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%w: etcd_ca: %s holds no certificate", dek.ErrInvalid, c.EtcdCA)
	}
	st, err := os.Stat(c.EtcdKey)
	if err != nil {
		return nil, fmt.Errorf("%w: etcd_key: %w", dek.ErrInvalid, err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%w: etcd_key: %s can be read by others (mode %04o): chmod 600 %s",
			dek.ErrInvalid, c.EtcdKey, st.Mode().Perm(), c.EtcdKey)
	}
	cert, err := tls.LoadX509KeyPair(c.EtcdCert, c.EtcdKey)
	if err != nil {
		return nil, fmt.Errorf("etcd_cert, etcd_key: %w", err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, Certificates: []tls.Certificate{cert}}, nil
}

// newLogger logs to w in key=value lines, which journald and people can read.
func newLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelInfo}))
}
