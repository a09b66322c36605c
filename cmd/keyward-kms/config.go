package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/identity"
)

// A Config is the service's configuration file: strict JSON, read once. Audit
// places, module path and listeners are set here only, never over the wire.
type Config struct {
	// StateDir holds the embedded store; made 0700. Required.
	StateDir string `json:"state_dir"`
	// AuditDir holds the audit log. Empty: "audit" beside StateDir's content.
	// Put it on a file system of its own: a full disk there stops all key use.
	AuditDir string `json:"audit_dir,omitempty"`
	// Listen are host:port addresses of the gRPC door. Required.
	Listen []string `json:"listen"`
	// Names are the host names and IP addresses clients reach the service by;
	// they go into the server's certificate and into enrolment tokens. Empty: the
	// hosts of Listen; required if one of these is every address ("0.0.0.0").
	Names []string `json:"names,omitempty"`
	// Token is the HSM. Exactly one of Token and SoftwareToken is set.
	Token *TokenConfig `json:"token,omitempty"`
	// SoftwareToken is the directory of a pure-Go token, for trying out only.
	SoftwareToken string `json:"software_token,omitempty"`
	// Strict refuses conflicting roles in one hand. Default true.
	Strict *bool `json:"strict,omitempty"`
	// BackupDir gets a sealed backup after every new key version. Empty: none,
	// and status is red.
	BackupDir string `json:"backup_dir,omitempty"`
	// RecoveryRecipientFile holds the public recovery recipient made by
	// `keyward recovery generate`; read by init and restore. Empty: none, and
	// status is red.
	RecoveryRecipientFile string `json:"recovery_recipient_file,omitempty"`
	// ControlSocket is a Unix socket for root on this host: backup and status.
	// Empty: "control.sock" in StateDir.
	ControlSocket string `json:"control_socket,omitempty"`
	// MetricsListen is a loopback host:port for Prometheus. Empty: none.
	MetricsListen string `json:"metrics_listen,omitempty"`
	// EtcdEndpoints use an external etcd instead of the embedded member.
	EtcdEndpoints []string `json:"etcd_endpoints,omitempty"`
	// EtcdCA, EtcdCert and EtcdKey are PEM files for external endpoints; nobody
	// else may read EtcdKey.
	EtcdCA   string `json:"etcd_ca,omitempty"`
	EtcdCert string `json:"etcd_cert,omitempty"`
	EtcdKey  string `json:"etcd_key,omitempty"`
	// ClientDays is the life of a client certificate in days, 1 to 90; 0: 7.
	ClientDays int `json:"client_days,omitempty"`
}

// A TokenConfig names one PKCS#11 token.
type TokenConfig struct {
	// Module is the absolute path of the vendor's library.
	Module string `json:"module"`
	// URI names the token (RFC 7512), for example "pkcs11:token=keyward".
	URI string `json:"uri"`
	// PINFile holds the user PIN; a regular file nobody else can read. With
	// systemd's LoadCredential= it is "$CREDENTIALS_DIRECTORY/NAME"; no other
	// variable is looked at.
	PINFile string `json:"pin_file"`
	// Deadline bounds one call to the token; past it the module's process is
	// killed and restarted. A duration such as "10s"; empty: 10s.
	Deadline string `json:"deadline,omitempty"`
	// Workers is the number of parallel private-key operations. 0: one per CPU.
	Workers int `json:"workers,omitempty"`
}

const (
	defaultClientDays = 7
	maxClientDays     = 90
	maxConfigBytes    = 1 << 20
)

// loadConfig reads and checks a file; every mistake is reported at once,
// before any device or port is touched.
func loadConfig(name string) (*Config, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	// It names the library that gets the PIN: who may write it owns the keys.
	if st.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("%w: configuration %s can be written by others (mode %04o): chmod go-w %s",
			dek.ErrInvalid, name, st.Mode().Perm(), name)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxConfigBytes))
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", name, err)
	}
	c, err := parseConfig(b)
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", name, err)
	}
	return c, nil
}

func parseConfig(b []byte) (*Config, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	var c Config
	if err := dec.Decode(&c); err != nil {
		return nil, err
	}
	if dec.More() {
		return nil, errors.New("text after the closing brace")
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	c.fill()
	return &c, nil
}

func (c *Config) check() error {
	var errs []error
	bad := func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...)))
	}
	if !filepath.IsAbs(c.StateDir) {
		bad("state_dir", "give an absolute path")
	}
	for field, p := range map[string]string{"audit_dir": c.AuditDir, "backup_dir": c.BackupDir,
		"control_socket": c.ControlSocket, "software_token": c.SoftwareToken,
		"recovery_recipient_file": c.RecoveryRecipientFile,
		"etcd_ca":                 c.EtcdCA, "etcd_cert": c.EtcdCert, "etcd_key": c.EtcdKey} {
		if p != "" && !filepath.IsAbs(p) {
			bad(field, "give an absolute path")
		}
	}
	c.checkDoors(bad)
	if c.MetricsListen != "" {
		if h, _, err := net.SplitHostPort(c.MetricsListen); err != nil || !net.ParseIP(h).IsLoopback() {
			bad("metrics_listen", "%q is not a loopback address and port", c.MetricsListen)
		}
	}
	if (c.Token == nil) == (c.SoftwareToken == "") {
		bad("token", "give exactly one of token and software_token")
	}
	if c.Token != nil {
		c.Token.check(bad)
	}
	if c.ClientDays < 0 || c.ClientDays > maxClientDays {
		bad("client_days", "must be 1 to %d", maxClientDays)
	}
	if len(c.EtcdEndpoints) > 0 && (c.EtcdCA == "" || c.EtcdCert == "" || c.EtcdKey == "") {
		bad("etcd_endpoints", "external etcd needs etcd_ca, etcd_cert and etcd_key")
	}
	return errors.Join(errs...)
}

// checkDoors also refuses what would only show once the first certificate is
// made, after the installation.
func (c *Config) checkDoors(bad func(field, format string, args ...any)) {
	if len(c.Listen) == 0 {
		bad("listen", "give at least one host:port")
	}
	for _, l := range c.Listen {
		host, port, err := net.SplitHostPort(l)
		if err != nil || port == "" || port == "0" {
			bad("listen", "%q is not host:port", l)
			continue
		}
		if ip := net.ParseIP(host); len(c.Names) == 0 && (host == "" || ip != nil && ip.IsUnspecified()) {
			bad("names", "listen %q is every address: say by which names clients reach this host", l)
		}
	}
	if len(c.Names) > 0 {
		if err := identity.CheckNames(c.Names); err != nil {
			bad("names", "%v", err)
		}
	}
}

// credentials is where systemd puts what LoadCredential= names.
const credentials = "$CREDENTIALS_DIRECTORY/"

// pinFile is PINFile with systemd's directory in place.
func (t *TokenConfig) pinFile() (string, error) {
	name, ok := strings.CutPrefix(t.PINFile, credentials)
	if !ok {
		return t.PINFile, nil
	}
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("%w: token.pin_file: %s: systemd has set no CREDENTIALS_DIRECTORY: add LoadCredential=%s:/path/of/the/pin to the unit",
			dek.ErrInvalid, t.PINFile, name)
	}
	return filepath.Join(dir, name), nil
}

func (t *TokenConfig) check(bad func(field, format string, args ...any)) {
	if !filepath.IsAbs(t.Module) {
		bad("token.module", "give the absolute path of the PKCS#11 library")
	}
	if t.URI == "" {
		bad("token.uri", "give an RFC 7512 URI, for example pkcs11:token=keyward")
	}
	if name, ok := strings.CutPrefix(t.PINFile, credentials); !filepath.IsAbs(t.PINFile) && (!ok || name != filepath.Base(name) || name == "..") {
		bad("token.pin_file", "give the absolute path of a file with the user PIN, or %sNAME", credentials)
	}
	if t.Deadline != "" {
		if d, err := time.ParseDuration(t.Deadline); err != nil || d < 100*time.Millisecond || d > 5*time.Minute {
			bad("token.deadline", "%q is not a duration between 100ms and 5m", t.Deadline)
		}
	}
	if t.Workers < 0 || t.Workers > 256 {
		bad("token.workers", "must be 0 to 256")
	}
}

func (c *Config) fill() {
	if c.AuditDir == "" {
		c.AuditDir = filepath.Join(c.StateDir, "audit")
	}
	if c.ControlSocket == "" {
		c.ControlSocket = filepath.Join(c.StateDir, "control.sock")
	}
	if c.Strict == nil {
		strict := true
		c.Strict = &strict
	}
	if c.ClientDays == 0 {
		c.ClientDays = defaultClientDays
	}
	if len(c.Names) == 0 {
		for _, l := range c.Listen {
			if h, _, err := net.SplitHostPort(l); err == nil && h != "" {
				c.Names = append(c.Names, h)
			}
		}
	}
}
