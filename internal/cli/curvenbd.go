package cli

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/cbd"
	"github.com/atollstore/atoll/internal/atoll"
)

const curveNBDUsage = `Usage: curve-nbd [options] map <image>  Map an image to nbd device
                 [options] unmap <device|image>   Unmap nbd device
                 [options] list-mapped  List mapped nbd devices
Map options:
  --device <device path>  Specify nbd device path (/dev/nbd{num})
  --read-only             Map read-only
  --nbds_max <limit>      Override for module param nbds_max
  --max_part <limit>      Override for module param max_part
  --timeout <seconds>     Set nbd request timeout
  --try-netlink           Use the nbd netlink interface
  --nebd-conf             LibNebd config file
  --no-exclusive          Map image non exclusive

Unmap options:
  -f, --force                 Force unmap even if the device is mounted
  --retry_times <limit>       The number of retries waiting for the process to exit
                              (default: 25)
  --sleep_ms <milliseconds>   Retry interval in milliseconds
                              (default: 200)

`

// curveImage is what "curve-nbd map" leaves beside an attachment.
type curveImage struct {
	Image   string `json:"image"`
	Options string `json:"options"`
}

func curveImageFile(volume string) string {
	return strings.TrimSuffix(attachFile(volume), ".json") + ".curve"
}

// curveMap is one command line of curve-nbd.
type curveMap struct {
	*App
	words []string
	flags map[string]string
	given []string // options as they are shown again
}

// curveNBDCommand is "atoll curve-nbd".
func (a *App) curveNBDCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "curve-nbd map|unmap|list-mapped",
		Short: "Take the command lines of Curve's curve-nbd",
		Long: `Take the command lines of Curve's curve-nbd: map makes a block device of a volume
as "atoll volume attach" does, unmap removes it, list-mapped lists. A link to
this program that is named curve-nbd does the same. Options that tune Curve's
own driver are taken and do nothing.`,
		Example:            "  atoll curve-nbd map cbd:pool//alice/disk1_alice_\n  atoll curve-nbd list-mapped",
		GroupID:            "use",
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			m := &curveMap{App: a, flags: map[string]string{}}
			err := m.run(cmd, args)
			if err == nil || errors.As(err, new(exitStatus)) {
				return err
			}
			fmt.Fprintf(a.Err, "curve-nbd: %v\n", err)
			return exitStatus(1)
		},
	}
}

// curveSays is an error in the words of Curve's tool.
type curveSays string

// Error returns the words.
func (e curveSays) Error() string { return string(e) }

// parse sorts options and words; Curve's tool takes options anywhere.
func (m *curveMap) parse(args []string) error {
	numbers := []string{"nbds_max", "max_part", "timeout", "retry_times", "sleep_ms"}
	for i := 0; i < len(args); i++ {
		name, value, with := strings.Cut(strings.TrimLeft(args[i], "-"), "=")
		switch {
		case !strings.HasPrefix(args[i], "-"):
			m.words = append(m.words, args[i])
			continue
		case slices.Contains([]string{"read-only", "try-netlink", "no-exclusive", "f", "force", "h", "help", "v", "version"}, name):
			value = "yes"
		case slices.Contains(numbers, name) || name == "device" || name == "nebd-conf":
			if !with {
				if i++; i == len(args) {
					return curveSays(fmt.Sprintf("Option --%s requires an argument.", name))
				}
				value = args[i]
			}
		default:
			m.words = append(m.words, args[i])
			continue
		}
		if slices.Contains(numbers, name) {
			if n, err := strconv.Atoi(value); err != nil || n < 0 || name == "max_part" && n > 255 {
				return curveSays(fmt.Sprintf("Invalid argument for %s!", name))
			}
		}
		m.flags[name] = value
		if value == "yes" {
			m.given = append(m.given, "--"+name)
		} else {
			m.given = append(m.given, "--"+name, value)
		}
	}
	return nil
}

func (m *curveMap) run(cmd *cobra.Command, args []string) error {
	if err := m.parse(args); err != nil {
		return err
	}
	switch {
	case m.flags["h"]+m.flags["help"] != "":
		fmt.Fprint(m.Out, curveNBDUsage)
		return nil
	case m.flags["v"]+m.flags["version"] != "":
		fmt.Fprintf(m.Out, "curve-nbd version : %s\n", cmd.Root().Version)
		return nil
	case len(m.words) == 0:
		return errors.New("must specify command")
	}
	want := map[string]int{"map": 2, "unmap": 2, "list-mapped": 1}[m.words[0]]
	switch {
	case want == 0:
		return fmt.Errorf("unknown command: %s", m.words[0])
	case len(m.words) > want:
		return fmt.Errorf("unknown args: %s", m.words[want])
	case m.words[0] == "list-mapped":
		return m.list()
	case len(m.words) < want && m.words[0] == "map":
		return errors.New("must specify image spec")
	case len(m.words) < want:
		return errors.New("must specify nbd device or image spec")
	case m.words[0] == "map":
		return m.mapImage(cmd, m.words[1])
	}
	return m.unmap(cmd, m.words[1])
}

// parseCurveImage takes "cbd:POOL/" + "/PATH_OWNER_" apart.
func parseCurveImage(image string) (path, owner string, err error) {
	_, rest, ok := strings.Cut(image, "/")
	end := strings.LastIndexByte(rest, '_')
	begin := -1
	if end > 0 {
		begin = strings.LastIndexByte(rest[:end], '_')
	}
	if !strings.HasPrefix(image, "cbd:") || !ok || begin < 2 || rest[0] != '/' || end != len(rest)-1 || begin+1 == end {
		return "", "", fmt.Errorf("image %s: want cbd:POOL//PATH_USER_", image)
	}
	return rest[:begin], rest[begin+1 : end], nil
}

// mapImage makes a block device of an image.
func (m *curveMap) mapImage(cmd *cobra.Command, image string) error {
	path, owner, err := parseCurveImage(image)
	if err != nil {
		return err
	}
	if os.Getuid() != 0 {
		return fmt.Errorf("map makes a block device, which only root may: %w", atoll.ErrDenied)
	}
	if err := m.checkOwner(path, owner); err != nil {
		return err
	}
	volume := path[1:]
	if old, err := readAttachment(volume); err == nil && alive(old.PID) {
		return fmt.Errorf("%s is mapped as %s", image, old.Device)
	}
	if _, err := m.volume(cmd, volume, true); err != nil {
		return err
	}
	at, err := m.spawnHelper(volume, attachOptions{driver: driverAny, readOnly: m.flags["read-only"] != ""})
	if err != nil {
		return err
	}
	b, err := json.Marshal(curveImage{Image: image, Options: strings.Join(m.given, " ")})
	if err == nil {
		err = os.WriteFile(curveImageFile(volume), append(b, '\n'), 0o600)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("note %s: %w", image, err), detach(at))
	}
	fmt.Fprintln(m.Out, at.Device)
	return nil
}

// checkOwner asks as the user of the image whether it may have it.
func (m *curveMap) checkOwner(path, owner string) error {
	conf, remove, err := m.curveConf("")
	if err != nil {
		return err
	}
	defer remove()
	var c cbd.CBDClient
	if c.Init(conf) != 0 {
		return fmt.Errorf("%s cannot be used", conf)
	}
	defer c.UnInit()
	var info cbd.FileInfo
	if ret := c.StatFile(path, cbd.UserInfo{Owner: owner}, &info); ret != 0 {
		return fmt.Errorf("open %s fail, ret = %d, %s", path, ret, curveName(ret))
	}
	return nil
}

// mapped is an attachment with the image that it was made of.
type mapped struct {
	attachment
	curveImage
}

// allMapped lists the living attachments of this machine.
func allMapped() (out []mapped, err error) {
	files, err := filepath.Glob(filepath.Join(attachDir(), "*.json"))
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		var x mapped
		b, err := os.ReadFile(f)
		if err != nil || json.Unmarshal(b, &x.attachment) != nil || !alive(x.PID) {
			continue // it is just going
		}
		x.Image = "cbd:pool//" + x.Volume
		if b, err := os.ReadFile(curveImageFile(x.Volume)); err == nil {
			_ = json.Unmarshal(b, &x.curveImage) // a broken note leaves the name
		}
		out = append(out, x)
	}
	return out, nil
}

// list prints one small table for each device, as Curve's tool does.
func (m *curveMap) list() error {
	all, err := allMapped()
	if err != nil {
		return err
	}
	for _, x := range all {
		row := []string{strconv.Itoa(x.PID), x.Image, x.Device, x.Options}
		for i, head := range []string{"pid", "image", "device", "options"} {
			fmt.Fprintf(m.Out, "%-*s ", max(len(head), len(row[i])), head)
		}
		fmt.Fprintln(m.Out)
		for i, head := range []string{"pid", "image", "device", "options"} {
			fmt.Fprintf(m.Out, "%-*s ", max(len(head), len(row[i])), row[i])
		}
		fmt.Fprint(m.Out, "\n\n")
	}
	return nil
}

// unmap removes a device, named by itself or by its image.
func (m *curveMap) unmap(cmd *cobra.Command, what string) error {
	all, err := allMapped()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(x mapped) bool { return x.Device == what || x.Image == what })
	if i < 0 {
		return fmt.Errorf("%s is not mapped", what)
	}
	x := all[i]
	where := mountedOn(x.Device)
	force := m.flags["f"]+m.flags["force"] != ""
	if where != "" && !force {
		return fmt.Errorf("the %s is still mount on %s, you can't unmap it or specify -f parameter", x.Device, where)
	}
	if where != "" {
		if err := m.command(cmd.Context(), "umount", where); err != nil {
			return err
		}
	}
	tries, pause := 25, 200*time.Millisecond
	if v := m.flags["retry_times"]; v != "" {
		tries, _ = strconv.Atoi(v) // checked by parse
	}
	if v := m.flags["sleep_ms"]; v != "" {
		n, _ := strconv.Atoi(v) // checked by parse
		pause = time.Duration(n) * time.Millisecond
	}
	err = detach(x.attachment)
	for ; errors.Is(err, atoll.ErrBusy) && tries > 0; tries-- {
		select {
		case <-time.After(pause):
		case <-cmd.Context().Done():
			return cmd.Context().Err()
		}
		err = detach(x.attachment)
	}
	return errors.Join(err, removeIfThere(curveImageFile(x.Volume)))
}

// mountedOn returns where a device is mounted, or "".
func mountedOn(device string) string {
	f, err := os.Open("/proc/mounts")
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if w := strings.Fields(s.Text()); len(w) > 1 && w[0] == device {
			return w[1]
		}
	}
	return ""
}
