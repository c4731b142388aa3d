package cli

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

func (a *App) doctorCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:     "doctor",
		Short:   "Check this machine and the server, and say what to mend",
		GroupID: "look",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			findings := machineFindings(dir)
			findings = append(findings, a.serverFindings(cmd.Context())...)
			if a.output != "table" {
				if err := a.json(&atollv1.DiagnoseResponse{Findings: findings}); err != nil {
					return err
				}
			} else {
				a.printFindings(findings)
			}
			for _, f := range findings {
				if f.Level == "fail" {
					return fmt.Errorf("something needs mending, see above: %w", atoll.ErrUnavailable)
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "data", ".", "directory on the disk that is to hold data")
	return cmd
}

func (a *App) printFindings(findings []*atollv1.Finding) {
	marks := map[string]string{"ok": "✓", "warn": "!", "fail": "✗"}
	for _, f := range findings {
		fmt.Fprintf(a.Out, "%s %s\n", marks[f.Level], f.What)
		if f.Fix != "" && f.Level != "ok" {
			fmt.Fprintf(a.Out, "    → %s\n", f.Fix)
		}
	}
}

// serverFindings asks the server for its own.
func (a *App) serverFindings(ctx context.Context) []*atollv1.Finding {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := a.dial()
	if err == nil {
		defer c.Close()
		var r *connect.Response[atollv1.DiagnoseResponse]
		if r, err = c.Cluster.Diagnose(ctx, connect.NewRequest(&atollv1.DiagnoseRequest{})); err == nil {
			return r.Msg.Findings
		}
	}
	return []*atollv1.Finding{{Level: "warn", What: "server: " + err.Error(), Fix: firstNonEmpty(api.Hint(err), `start it with "atoll server"`)}}
}

func firstNonEmpty(s ...string) string {
	for _, v := range s {
		if v != "" {
			return v
		}
	}
	return ""
}

// machineFindings looks at what the machine offers.
func machineFindings(dir string) []*atollv1.Finding {
	out := []*atollv1.Finding{fsyncFinding(dir), spaceFinding(dir), filesFinding(), clockFinding()}
	return append(out, attachFinding())
}

// fsyncFinding measures how long a durable 4 KiB write takes.
func fsyncFinding(dir string) *atollv1.Finding {
	f, err := os.CreateTemp(dir, ".atoll-doctor-*")
	if err != nil {
		return &atollv1.Finding{Level: "fail", What: fmt.Sprintf("data directory %s: %v", dir, err), Fix: "name a directory that you can write to with --data"}
	}
	defer os.Remove(f.Name())
	defer f.Close()
	buf := make([]byte, 4096)
	var worst, sum time.Duration
	const rounds = 20
	for i := range rounds {
		start := time.Now()
		if _, err := f.WriteAt(buf, int64(i)*4096); err != nil {
			return &atollv1.Finding{Level: "fail", What: fmt.Sprintf("write to %s: %v", dir, err)}
		}
		if err := f.Sync(); err != nil {
			return &atollv1.Finding{Level: "fail", What: fmt.Sprintf("fsync in %s: %v", dir, err), Fix: "replace the disk"}
		}
		d := time.Since(start)
		sum += d
		worst = max(worst, d)
	}
	mean := sum / rounds
	what := fmt.Sprintf("durable write in %s: %s on average, %s at worst", dir, mean.Round(time.Microsecond), worst.Round(time.Microsecond))
	if mean > 10*time.Millisecond {
		return &atollv1.Finding{Level: "warn", What: what, Fix: "this disk is slow to flush; an SSD with power-loss protection makes durable writes fast"}
	}
	return &atollv1.Finding{Level: "ok", What: what}
}

func spaceFinding(dir string) *atollv1.Finding {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return &atollv1.Finding{Level: "warn", What: fmt.Sprintf("free space in %s: %v", dir, err)}
	}
	free := int64(st.Bavail) * st.Bsize
	what := fmt.Sprintf("free space in %s: %s", dir, FormatSize(free))
	if free < 1<<30 {
		return &atollv1.Finding{Level: "warn", What: what, Fix: "give it at least 1 GiB"}
	}
	return &atollv1.Finding{Level: "ok", What: what}
}

func filesFinding() *atollv1.Finding {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return &atollv1.Finding{Level: "warn", What: "open files limit: " + err.Error()}
	}
	what := fmt.Sprintf("open files limit: %d", r.Max)
	if r.Max < 4096 {
		return &atollv1.Finding{Level: "warn", What: what, Fix: "raise it: ulimit -n 65536, or LimitNOFILE= in the systemd unit"}
	}
	return &atollv1.Finding{Level: "ok", What: what}
}

func clockFinding() *atollv1.Finding {
	if y := time.Now().Year(); y < 2026 {
		return &atollv1.Finding{Level: "fail", What: fmt.Sprintf("the clock says the year %d", y), Fix: "set it: certificates and tokens depend on it"}
	}
	return &atollv1.Finding{Level: "ok", What: "clock: " + time.Now().Format(time.DateTime)}
}

// attachFinding tells how "volume attach" would make a block device here.
func attachFinding() *atollv1.Finding {
	var ways []string
	if m, _ := filepath.Glob("/sys/block/nbd*"); len(m) > 0 {
		ways = append(ways, "kernel NBD")
	}
	_, fuseErr := os.Stat("/dev/fuse")
	_, loopErr := os.Stat("/dev/loop-control")
	if fuseErr == nil && loopErr == nil {
		ways = append(ways, "FUSE file + loop device")
	}
	if len(ways) == 0 {
		return &atollv1.Finding{Level: "warn", What: "volume attach: neither the nbd module nor /dev/fuse with /dev/loop-control is here", Fix: "modprobe nbd (or fuse and loop); NBD clients work without"}
	}
	what := "volume attach: " + strings.Join(ways, ", ")
	if os.Getuid() != 0 {
		what += " (needs root)"
	}
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		what += "; no mkfs.ext4 for --mkfs"
	}
	return &atollv1.Finding{Level: "ok", What: what}
}
