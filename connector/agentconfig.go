package connector

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
)

// maxAgentFileBytes bounds an agent's configuration file.
const maxAgentFileBytes = 1 << 20

// maxSocketPath is the longest path of a Unix socket (unix(7): 108 bytes with
// the terminating zero).
const maxSocketPath = 107

// Where the parts of an agent are unless somebody says otherwise.
const (
	DefaultAgentConfig    = "/etc/keyward/agent.json"
	DefaultAgentState     = "/var/lib/keyward-agent"
	DefaultAgentSocket    = "/run/keyward/agent.sock"
	DefaultHostSecretFile = "/etc/keyward/host-secret"
)

// An AgentFile is the agent's configuration file: strict JSON, read once. It
// holds no secret; `keyward plugin register` writes it.
type AgentFile struct {
	// Socket is the Unix socket that databases connect to, an absolute path of
	// at most 107 bytes. Required.
	Socket string `json:"socket"`
	// StateDir holds identity, wrapped keys and the newest audit checkpoint;
	// made 0700. Required.
	StateDir string `json:"state_dir"`
	// HostSecretFile seals the identity's key; see OpenHostSecret. It must lie
	// outside StateDir. Required, though a systemd credential comes first.
	HostSecretFile string `json:"host_secret_file"`
	// Endpoints are host:port addresses of the key service. Empty: those the
	// identity was enrolled with.
	Endpoints []string `json:"endpoints,omitempty"`
	// Instances are the databases of this host and who may speak for them. At
	// least one.
	Instances []AgentInstance `json:"instances"`
	// Refresh is how often what is held is confirmed with the key service, a
	// duration such as "1h" (the default), 1m to 24h. A change arrives within
	// a second without it.
	Refresh string `json:"refresh,omitempty"`
	// OutageLimit is how long keys are handed out that the key service can't
	// confirm because it is unreachable. Empty: without limit.
	OutageLimit string `json:"outage_limit,omitempty"`
	// DenialGrace is how long keys are still handed out after the key service
	// said no. Empty: not at all.
	DenialGrace string `json:"denial_grace,omitempty"`
	// CacheKeys bounds the keys held in locked memory. 0: 10000.
	CacheKeys int `json:"cache_keys,omitempty"`
	// MetricsListen is a loopback host:port for Prometheus. Empty: none.
	MetricsListen string `json:"metrics_listen,omitempty"`
}

// An AgentInstance is one database of the host.
type AgentInstance struct {
	// Name is the name it was prepared under.
	Name string `json:"name"`
	// Kind is the kind of database, "mariadb".
	Kind string `json:"kind"`
	// User is the account the database server runs as, a name or a number. Its
	// processes alone get the keys; root does not, unless it is named.
	User string `json:"user"`
}

// ParseAgentFile reads a configuration. Unknown fields, missing ones and
// anything after the object are refused; all mistakes are reported at once.
// Errors wrap dek.ErrInvalid.
func ParseAgentFile(b []byte) (AgentFile, error) {
	var c AgentFile
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return AgentFile{}, fmt.Errorf("%w: agent configuration: %w", dek.ErrInvalid, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return AgentFile{}, fmt.Errorf("%w: agent configuration: data after its end", dek.ErrInvalid)
	}
	return c, c.Check()
}

// ReadAgentFile reads the file at path. It wraps dek.ErrInvalid, and
// fs.ErrNotExist if there is no file.
func ReadAgentFile(path string) (AgentFile, error) {
	f, err := os.Open(path) //nolint:gosec // the operator names the file
	if err != nil {
		return AgentFile{}, fmt.Errorf("%w: agent configuration: %w", dek.ErrInvalid, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxAgentFileBytes+1))
	if err == nil && len(b) > maxAgentFileBytes {
		err = fmt.Errorf("over %d bytes", maxAgentFileBytes)
	}
	if err != nil {
		return AgentFile{}, fmt.Errorf("%w: agent configuration %s: %w", dek.ErrInvalid, path, err)
	}
	c, err := ParseAgentFile(b)
	if err != nil {
		return AgentFile{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Encode returns the file's bytes.
func (c AgentFile) Encode() ([]byte, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("agent configuration: %w", err)
	}
	return append(b, '\n'), nil
}

// Check reports everything that can't be right, as dek.ErrInvalid.
func (c AgentFile) Check() error {
	var wrong []string
	note := func(bad bool, format string, args ...any) {
		if bad {
			wrong = append(wrong, fmt.Sprintf(format, args...))
		}
	}
	for _, p := range []struct{ field, path string }{
		{"socket", c.Socket}, {"state_dir", c.StateDir}, {"host_secret_file", c.HostSecretFile},
	} {
		note(!filepath.IsAbs(p.path), "%s %q: want an absolute path", p.field, p.path)
	}
	note(len(c.Socket) > maxSocketPath, "socket: over %d bytes", maxSocketPath)
	if c.StateDir != "" && c.HostSecretFile != "" {
		if err := checkHostSecretPlace(c.StateDir, c.HostSecretFile); err != nil {
			wrong = append(wrong, strings.TrimPrefix(err.Error(), dek.ErrInvalid.Error()+": "))
		}
	}
	if len(c.Endpoints) > 0 {
		err := checkEndpoints(c.Endpoints)
		note(err != nil, "endpoints: %v", err)
	}
	note(len(c.Instances) == 0, "instances: at least one is wanted")
	for i, in := range c.Instances {
		note(dek.CheckName("name", in.Name) != nil, "instances: name %q", in.Name)
		note(dek.CheckName("kind", in.Kind) != nil, "instances: kind %q", in.Kind)
		note(in.User == "", "instances: %s: user is missing", in.Name)
		note(slices.ContainsFunc(c.Instances[:i], func(o AgentInstance) bool { return o.Name == in.Name }), "instances: %s twice", in.Name)
	}
	note(c.CacheKeys < 0, "cache_keys %d: below 0", c.CacheKeys)
	_, err := c.times()
	note(err != nil, "%v", err)
	if err := checkMetricsListen(c.MetricsListen); err != nil {
		note(true, "metrics_listen: %v", err)
	}
	if len(wrong) > 0 {
		return fmt.Errorf("%w: agent configuration: %s", dek.ErrInvalid, strings.Join(wrong, "; "))
	}
	return nil
}

// agentTimes are the three separate times of an agent; 0 is its default.
type agentTimes struct{ refresh, outage, grace time.Duration }

func (c AgentFile) times() (agentTimes, error) {
	var t agentTimes
	for _, f := range []struct {
		field, text string
		least, most time.Duration
		to          *time.Duration
	}{
		{"refresh", c.Refresh, time.Minute, 24 * time.Hour, &t.refresh},
		{"outage_limit", c.OutageLimit, time.Second, 10 * 365 * 24 * time.Hour, &t.outage},
		{"denial_grace", c.DenialGrace, time.Second, 30 * 24 * time.Hour, &t.grace},
	} {
		if f.text == "" {
			continue
		}
		d, err := time.ParseDuration(f.text)
		if err != nil || d < f.least || d > f.most {
			return agentTimes{}, fmt.Errorf("%w: %s %q: want a duration of %v to %v, or leave it out", dek.ErrInvalid, f.field, f.text, f.least, f.most)
		}
		*f.to = d
	}
	return t, nil
}

// Config returns what NewAgent takes, with the accounts of this host looked
// up. The socket's group is that of the first instance's account. It wraps
// dek.ErrInvalid, also for an account that does not exist.
func (c AgentFile) Config() (AgentConfig, error) {
	if err := c.Check(); err != nil {
		return AgentConfig{}, err
	}
	t, err := c.times()
	if err != nil {
		return AgentConfig{}, err
	}
	cfg := AgentConfig{
		Socket: c.Socket, SocketGID: -1, StateDir: c.StateDir, HostSecretFile: c.HostSecretFile, Endpoints: c.Endpoints,
		Refresh: t.refresh, OutageLimit: t.outage, DenialGrace: t.grace, MaxKeys: c.CacheKeys, MetricsListen: c.MetricsListen,
	}
	for i, in := range c.Instances {
		uid, gid, err := LookupAccount(in.User)
		if err != nil {
			return AgentConfig{}, fmt.Errorf("agent configuration: instance %s: %w", in.Name, err)
		}
		if i == 0 {
			cfg.SocketGID = int(gid)
		}
		cfg.Instances = append(cfg.Instances, InstanceRule{UID: uid, Instance: in.Name})
	}
	return cfg, nil
}

// LookupAccount returns the user and primary group id of an account given by
// name or number. It wraps dek.ErrInvalid if this host has none.
func LookupAccount(name string) (uid, gid uint32, err error) {
	find := user.Lookup
	if _, err := strconv.ParseUint(name, 10, 32); err == nil {
		find = user.LookupId
	}
	u, err := find(name)
	if err != nil {
		return 0, 0, fmt.Errorf("%w: account %q: %w", dek.ErrInvalid, name, err)
	}
	id, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return 0, 0, fmt.Errorf("%w: account %q: uid %q", dek.ErrInvalid, name, u.Uid)
	}
	group, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return 0, 0, fmt.Errorf("%w: account %q: gid %q", dek.ErrInvalid, name, u.Gid)
	}
	return uint32(id), uint32(group), nil
}

// ReadAgentConfig reads the file at path into what NewAgent takes.
func ReadAgentConfig(path string) (AgentConfig, error) {
	f, err := ReadAgentFile(path)
	if err != nil {
		return AgentConfig{}, err
	}
	return f.Config()
}
