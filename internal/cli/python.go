package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/python"
)

// pythonCommand is "atoll python".
func (a *App) pythonCommand() *cobra.Command {
	var env, wheel bool
	var dir string
	cmd := &cobra.Command{
		Use:     "python",
		Short:   "Print the curvefs module for Python",
		GroupID: "use",
		Long: `Print curvefs.py, the module with which scripts for Curve use this cluster. It
is one file that needs nothing but Python (2.7, or 3.6 and later). With --env it
is put into a directory, and what is printed makes the shell's Python find it.
With --wheel a wheel for pip is put there, and its path is printed.`,
		Example: `  atoll python > curvefs.py
  eval "$(atoll python --env)" && python3 script.py
  pip install --no-index "$(atoll python --wheel --dir .)"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case env && wheel:
				return usagef("--env or --wheel, not both")
			case wheel:
				return a.pythonWheel(dir, cmd.Root().Version)
			case !env:
				fmt.Fprint(a.Out, python.Curvefs)
				return nil
			}
			return a.pythonEnv(dir)
		},
	}
	cmd.Flags().BoolVar(&env, "env", false, "put the module into a directory and print the setting of PYTHONPATH")
	cmd.Flags().BoolVar(&wheel, "wheel", false, "put a wheel for pip into a directory and print its path")
	cmd.Flags().StringVar(&dir, "dir", "", "that directory (default: atoll/python in the user's cache)")
	return cmd
}

// pythonEnv installs the module and prints a line for the shell.
func (a *App) pythonEnv(dir string) error {
	path, err := putPython(dir, "curvefs.py", []byte(python.Curvefs))
	if err != nil {
		return err
	}
	fmt.Fprintf(a.Out, "export PYTHONPATH=%s${PYTHONPATH:+:$PYTHONPATH}\n", shellQuote(filepath.Dir(path)))
	return nil
}

// pythonWheel writes a wheel and prints its path.
func (a *App) pythonWheel(dir, version string) error {
	name, text, err := python.Wheel(version)
	if err != nil {
		return err
	}
	path, err := putPython(dir, name, text)
	if err != nil {
		return err
	}
	fmt.Fprintln(a.Out, path)
	return nil
}

// putPython writes a file into a directory, which may be the default one, and
// returns its whole path. Whoever uses an older one there keeps it.
func putPython(dir, name string, text []byte) (string, error) {
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return "", usagef("no directory for the module: %w; name one with --dir", err)
		}
		dir = filepath.Join(cache, "atoll", "python")
	}
	dir, err := filepath.Abs(dir)
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		return "", fmt.Errorf("make directory for the module: %w", err)
	}
	path := filepath.Join(dir, name)
	tmp, err := os.CreateTemp(dir, ".curvefs-")
	if err != nil {
		return "", fmt.Errorf("write %s: %w", path, err)
	}
	_, err = tmp.Write(text)
	if err = errors.Join(err, tmp.Chmod(0o644), tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return "", errors.Join(fmt.Errorf("write %s: %w", path, err), removeIfThere(tmp.Name()))
	}
	return path, nil
}
