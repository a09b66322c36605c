package register

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/keyward/keyward/dek"
)

// agentUnit is the systemd unit of the agent.
const agentUnit = "keyward-agent.service"

// unitDir is where an administrator's units are (systemd.unit(5)).
const unitDir = "/etc/systemd/system"

// unitText is written where no package has brought a unit. It starts the agent
// before the server, which asks it for keys when it opens its files, and
// leaves no limit on locked memory, where the keys are.
func unitText(program, config string) []byte {
	return fmt.Appendf(nil, `# Written by: keyward plugin register mariadb
[Unit]
Description=Keyward agent: data keys for this host's databases
After=network-online.target
Wants=network-online.target
Before=mariadb.service

[Service]
ExecStart=%s --config %s
Restart=always
RestartSec=1
LimitMEMLOCK=infinity
LimitCORE=0
NoNewPrivileges=yes
ProtectSystem=full
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
LockPersonality=yes
MemoryDenyWriteExecute=yes

[Install]
WantedBy=multi-user.target
`, program, config)
}

// ensureUnit writes the unit if the host has none, and refuses one that runs
// an agent with another configuration.
func (r runner) ensureUnit(ctx context.Context) error {
	for _, p := range []string{r.program, r.config} {
		if err := checkCnfValue("path in a systemd unit", p); err != nil {
			return err
		}
	}
	have, err := exec.CommandContext(ctx, "systemctl", "cat", agentUnit).Output()
	if err == nil {
		if !bytes.Contains(have, []byte(r.config)) {
			return fmt.Errorf("%w: the unit %s does not name %s: change it (systemctl edit), or start the agent otherwise (--start-agent)",
				dek.ErrExists, agentUnit, r.config)
		}
		return nil
	}
	if _, err := writeFile(filepath.Join(r.units, agentUnit), unitText(r.program, r.config), 0o644); err != nil {
		return fmt.Errorf("%w: write the agent's unit: %w", dek.ErrPrecondition, err)
	}
	return systemctl(ctx, "daemon-reload")
}

// startUnit brings the unit up with the present configuration. A restart does
// no harm to a database server that runs, but is spared if nothing changed.
func (r runner) startUnit(ctx context.Context, changed bool) (made bool, detail string, err error) {
	if err := r.ensureUnit(ctx); err != nil {
		return false, "", err
	}
	if !changed && systemctl(ctx, "is-active", "--quiet", agentUnit) == nil {
		return false, "systemd unit " + agentUnit, r.await(ctx, nil)
	}
	for _, verb := range []string{"enable", "restart"} {
		if err := systemctl(ctx, verb, agentUnit); err != nil {
			return false, "", err
		}
	}
	return true, "systemd unit " + agentUnit + ", started at boot", r.await(ctx, nil)
}

func systemctl(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: systemctl %s: %w: %s", dek.ErrPrecondition, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
